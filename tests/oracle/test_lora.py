"""A LoRA that PEFT saves, as the official scripts do, gives the same numbers when it is merged here."""

import json

import pytest
import torch

from nanollava import lora
from nanollava.checkpoint import load_language

transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install .[oracle]")
peft = pytest.importorskip("peft", reason="the reference implementation: pip install .[oracle]")

TOLERANCE = 2e-5  # relative, float32
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # all that official runs adapt
SIZES = (
    {"hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6},
    {"hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4},
)


@pytest.mark.parametrize("targets", [LINEAR, ["q_proj", "v_proj"]], ids=["all", "qv"])
@pytest.mark.parametrize("sizes", SIZES, ids=["48", "40"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_merged_logits_are_peft_s(sizes, targets, safe, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=70, num_key_value_heads=2, **sizes)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, settings).eval()
    adapted.save_pretrained(tmp_path / "lora", safe_serialization=safe)
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    ours = load_language(tmp_path / "base")
    ids = torch.tensor([[1, 5, 60, 7, 33]])
    with torch.no_grad():
        before, expected = ours(ids), adapted(ids).logits
        lora.merge_folder(ours, tmp_path / "lora")
        found = ours(ids)
    assert (found - expected).abs().max() / expected.abs().max() < TOLERANCE
    assert (before - expected).abs().max() / expected.abs().max() > 0.01
