"""The same A and B on the same batch: PEFT's loss and PEFT's gradients. What a run leaves on its way, PEFT reads."""

import pytest
import torch

from nanollava.checkpoint import load_language, save_language
from nanollava.llama import Llama, LlamaConfig
from nanollava.llava import Batch, Llava, LlavaConfig
from nanollava.train import lora
from nanollava.train.loop import Options
from nanollava.vit import VisionConfig

transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install .[oracle]")
peft = pytest.importorskip("peft", reason="the reference implementation: pip install .[oracle]")

TOLERANCE = 2e-5  # relative to the largest, float32
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = (LlamaConfig(70, 48, 56, 3, 6, 2), LlamaConfig(70, 40, 72, 2, 4))
RANK, ALPHA = 5, 12


def pair_of_models(sizes: LlamaConfig, folder) -> tuple[Llava, "peft.PeftModel"]:
    """The same decoder with the same adapters, here and in PEFT."""
    torch.manual_seed(0)
    language = Llama(sizes)
    for parameter in language.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_language(language, None, folder)
    vision = VisionConfig(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = Llava(LlavaConfig(vision, sizes))
    model.language = load_language(folder)
    lora.adapt(model, RANK, ALPHA, 0.0)
    for _, adapted in lora.adapters(model.language):
        adapted.B.data.normal_(std=0.1)
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEAR, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(folder), settings)
    for name, adapted in lora.adapters(model.language):
        other = theirs.get_submodule(f"base_model.model.model.{name.removesuffix('.weight')}")
        other.lora_A.default.weight.data.copy_(adapted.A.data)
        other.lora_B.default.weight.data.copy_(adapted.B.data)
    return model, theirs


def one_row(ids: torch.Tensor, labels: torch.Tensor) -> Batch:
    nothing = torch.zeros_like(ids)
    return Batch(ids, labels, nothing - 1, torch.arange(ids.shape[1])[None], nothing, nothing, None)


@pytest.mark.parametrize("sizes", SIZES, ids=["48", "40"])
def test_loss_and_gradients_are_peft_s(sizes, tmp_path):
    model, theirs = pair_of_models(sizes, tmp_path / "base")
    ids = torch.randint(3, 70, (1, 23))
    labels = ids.clone()
    labels[:, :6] = -100
    ours = model.loss(one_row(ids, labels)) / (labels[:, 1:] != -100).sum()
    ours.backward()
    other = theirs(ids, labels=labels).loss
    other.backward()
    assert ours.item() == pytest.approx(other.item(), rel=TOLERANCE)
    count = 0
    for name, adapted in lora.adapters(model.language):
        module = theirs.get_submodule(f"base_model.model.model.{name.removesuffix('.weight')}")
        for found, expected in ((adapted.A, module.lora_A.default.weight), (adapted.B, module.lora_B.default.weight)):
            assert expected.grad.abs().max() > 0
            assert (found.grad - expected.grad).abs().max() / expected.grad.abs().max() < TOLERANCE, name
            count += 1
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert count == len(trained) == 14 * sizes.num_hidden_layers
    assert all(p.grad is None for p in model.language.parameters() if not p.requires_grad)


def test_a_begins_as_peft_s_and_b_is_zero(tmp_path):
    """Both draw A uniformly within 1 / sqrt(in): the same bounds, the same spread."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(400, 300, bias=False)
    ours = lora.LoRALinear(linear, 64, 128, 0.0)
    theirs = peft.LoraConfig(r=64, target_modules=["0"])
    theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(400, 300, bias=False)), theirs)
    other = theirs.get_submodule("base_model.model.0").lora_A.default.weight
    assert not ours.B.any()
    assert ours.A.std().item() == pytest.approx(other.std().item(), rel=0.03)
    assert ours.A.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.01)


def test_peft_reads_what_a_run_leaves_on_its_way(tmp_path):
    model, theirs = pair_of_models(SIZES[0], tmp_path / "base")
    (tmp_path / "run").mkdir()
    options = Options(1e-3, None, 1, 1, lora=RANK, lora_alpha=ALPHA, lora_dropout=0.05, base="base")
    lora.write_trained(model, lora.trained(model), tmp_path / "run", options)
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    read = peft.PeftModel.from_pretrained(base, tmp_path / "run").eval()
    ids = torch.tensor([[1, 5, 60, 7, 33]])
    with torch.no_grad():
        expected, found = theirs.eval()(ids).logits, read(ids).logits
        ours = model.language.eval()(ids)
        lora.merge(model)
        merged = model.language(ids)
    for logits in (found, ours, merged):
        assert (logits - expected).abs().max() / expected.abs().max() < TOLERANCE
