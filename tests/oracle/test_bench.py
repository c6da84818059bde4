"""The benchmark against transformers: both do the same work, and different work is noticed."""

import json
from dataclasses import replace

import pytest
import torch

from nanollava.bench import __main__ as command
from nanollava.bench import measure, models, ours, reference
from nanollava.bench.limits import Limits
from nanollava.llama import LlamaConfig
from nanollava.llava import LlavaConfig
from nanollava.vit import VisionConfig

pytest.importorskip("transformers", reason="the reference implementation: pip install .[oracle]")

CPU = torch.device("cpu")
TINY = LlavaConfig(VisionConfig(16, 8, 16, 40, 3, 2), LlamaConfig(64, 24, 36, 2, 4, 2), "mlp2x_gelu")
TIED = replace(TINY, language=replace(TINY.language, tie_word_embeddings=True))
SMALL = measure.Effort(2, 5, 3, 2, 1, 2)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark on architectures that take no time."""
    monkeypatch.setattr(models, "MODELS", {"miniature": TINY, "135m": TIED})
    monkeypatch.setattr(measure, "QUICK", {"miniature": SMALL, "135m": replace(SMALL, warm=False, compiled=True)})
    monkeypatch.setattr(command, "measure_limits", lambda device, dtype: Limits(1.0, 2.0, 3.0))


def test_every_row_compares_the_same_work(tiny, tmp_path, capsys):
    file = tmp_path / "all.json"
    assert command.main(["--quick", "--device", "cpu", "--out", str(file)]) == 0
    rows = {(row["model"], row["work"]): row for row in json.loads(file.read_text())["rows"]}
    assert len(rows) == 6 + 5 + len(ours.DECODERS)
    for (model, work), row in rows.items():
        assert len(row["ours"]) > 0 and row["rate"] > 0
        if work in ours.DECODERS and not ours.DECODERS[work].exact:  # held against our own decoding
            continue
        assert len(row["theirs"]) == len(row["ours"]) and row["ratio"] > 0, (model, work)
        assert row["agree"] is (None if work == "load" else True), (model, work)
    assert "NOT THE SAME WORK" not in capsys.readouterr().out
    assert rows["miniature", "stage 2 step"]["detail"]["padding of theirs"]
    assert len(rows["135m", "load"]["detail"]["peak of theirs"]) == len(rows["135m", "load"]["theirs"])


CHANGED = {
    "vision_tower.encoder.layers.1.mlp.fc1.weight": {"tower", "decode", "stage 1 step", "stage 2 step"},
    "multi_modal_projector.linear_1.weight": {"decode", "stage 1 step", "stage 2 step"},
    "language_model.layers.1.mlp.down_proj.weight": {"prefill", "decode", "stage 1 step", "stage 2 step"},
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_weight_that_differs_is_noticed(name, tmp_path, monkeypatch):
    """In every row whose work uses it: decoding notices where another token is the likeliest."""
    monkeypatch.setattr(models, "MODELS", {"miniature": TINY})
    right = reference.load

    def wrong(*args: object) -> torch.nn.Module:
        model = right(*args)
        chosen = [p for n, p in model.named_parameters() if n.replace("vision_model.", "").endswith(name)]
        with torch.no_grad():
            chosen[0].mul_(-1000)
        return model

    monkeypatch.setattr(reference, "load", wrong)
    monkeypatch.setattr(measure.Bench, "load", lambda self, *args: measure.Row("miniature", "load"))
    bench = measure.Bench(CPU, Limits(1, 1, 1), tmp_path, {"miniature": SMALL}, lambda line: None)
    rows = {row.work: row for row in bench.rows("miniature")}
    assert {work for work, row in rows.items() if row.agree is False} == CHANGED[name]
    assert all(rows[work].ratio is None and "NOT THE SAME WORK" in rows[work].note for work in CHANGED[name])


def test_what_is_trained_is_what_the_stage_trains(tmp_path):
    models.write_random(TINY, tmp_path / "m", torch.float32)
    for stage, parts in (
        ("stage1", {"multi_modal_projector"}),
        ("stage2", {"multi_modal_projector", "language_model"}),
    ):
        model = reference.load(tmp_path / "m", CPU, torch.float32)
        reference.trainer(model, stage)
        trained = {
            name.split(".")[1] if "." in name else name for name, p in model.named_parameters() if p.requires_grad
        }
        assert {name for name in trained if name != "weight"} == parts
        assert model.lm_head.weight.requires_grad is (stage == "stage2")


def test_adapters_are_on_every_linear_layer_of_the_blocks(tmp_path):
    pytest.importorskip("peft", reason="the reference for LoRA: pip install .[oracle]")
    models.write_random(TINY, tmp_path / "m", torch.float32)
    model = reference.load(tmp_path / "m", CPU, torch.float32)
    reference.trainer(model, "stage2", lora=4)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum("lora_A" in name for name in trained) == 2 * 7
    assert not [name for name in trained if "lora" not in name and "multi_modal_projector" not in name]
