"""Stage 2 with --lora as it is typed: what is trained, what a folder holds, resuming bit for bit, what is refused.

That A and B get PEFT's gradients is tested in tests/oracle.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from nanollava import folder as files
from nanollava.checkpoint import load, save
from nanollava.train import loop, lora, resume, settings
from nanollava.train.stages import STAGES, freeze

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WORDS = ("--lora", 4, "--lr", 1e-2, "--projector-lr", 1e-2, "--batch-size", 2, "--steps", 9, "--save-every", 3)
WORDS += ("--val-every", 2, "--val-fraction", 0.2)
SAME = ("step", "loss", "val_loss", "lr", "projector_lr", "grad_norm")


def talk(name: str, image: str | None, question: str, answer: str) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, **({"image": image} if image else {}), "conversations": turns}


TALKS = [
    talk("a1", "a.png", "<image>\nWhat color is the ball?", "The ball is blue."),
    talk("t1", None, "What is a square?", "It has four sides."),
    talk("b1", "b.png", "<image>\nWhat is this?", "A star."),
    talk("c1", "c.png", "<image>\nIs there a circle?", "There are three: a big green one and two small ones."),
    talk("d1", "d.png", "<image>\nWhat is this?", "A small red star."),
    talk("t2", None, "What is a circle?", "It is round."),
]


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "talks.json"
    file.write_text(json.dumps(TALKS))
    return file


@pytest.fixture(scope="module")
def aligned(trainer, talks) -> Path:
    """What stage 2 begins with."""
    captions = talks.parent / "captions.json"
    captions.write_text(json.dumps([talk(f"c{x}", f"{x}.png", "<image>", f"A ball {x}.") for x in "abcd"]))
    assert trainer.stage(1, captions, talks.parent / "stage1", "--steps", 2, "--batch-size", 2) == 0
    return talks.parent / "stage1"


@pytest.fixture(scope="module")
def undisturbed(trainer, talks, aligned) -> Path:
    assert trainer.stage(2, talks, talks.parent / "undisturbed", "--model", aligned, *WORDS) == 0
    return talks.parent / "undisturbed"


@pytest.fixture
def cut(trainer, talks, aligned, tmp_path, monkeypatch) -> Path:
    """A run that was stopped at step 5 of 9; its last checkpoint, of step 3, lies beside its base."""
    shutil.copytree(aligned, tmp_path / "stage1")

    def interrupted(self, *rest):
        if self.step == 5:
            raise KeyboardInterrupt
        report(self, *rest)

    report = loop.Run.report
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "report", interrupted)
        assert trainer.stage(2, talks, tmp_path / "cut", "--model", aligned, *WORDS) == 130
    return tmp_path / "cut"


def refused(capsys, status: int, *words: str) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and lines[-1].startswith("error: ") and not any("Traceback" in line for line in lines)
    for word in words:
        assert word in lines[-1]
    return lines[-1]


def metrics(folder: Path) -> list[tuple]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(entry.get(name) for name in SAME) for entry in entries]


# ---------------------------------------------------------------- what is trained


def test_every_linear_of_the_blocks_changes_by_a_matrix_of_the_rank_and_nothing_else_does(aligned, undisturbed):
    before, after = load(aligned).state_dict(), load(undisturbed).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {name for name in before if name.startswith("language.") and name.split(".")[-2] in ADAPTED}
    assert len(adapted) == 14 and changed == adapted | {"projector.weight", "projector.bias"}
    for name in adapted:
        values = torch.linalg.svdvals((after[name] - before[name]).double())
        assert values[3] > 1e-4 and values[4] < 1e-6  # rank 4; what follows is the rounding of the sum


def test_the_table_shows_what_is_trained(trainer, talks, aligned, tmp_path, capsys):
    assert trainer.stage(2, talks, tmp_path / "out", "--model", aligned, "--lora", 4, "--steps", 1) == 0
    table = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line[:1].isalpha()}
    sizes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 16), (32, 16), (16, 32)]
    trained = 2 * sum(4 * (a + b) for a, b in sizes)
    assert table["vision"][1] == "0" and table["language"][1] == f"{trained:,}"
    assert table["projector"][0] == table["projector"][1] == f"{16 * 32 + 32:,}"


def test_without_numbers_the_settings_are_those_of_v15(tmp_path):
    words = ["stage2", "--data", "d", "--out", str(tmp_path / "out"), "--device", "cpu"]
    for given, expected in (
        (["--lora"], (128, 256, 0.05, 2e-4, 2e-5)),
        (["--lora", "8", "--lr", "1e-3"], (8, 16, 0.05, 1e-3, 2e-5)),
        (["--lora", "8", "--lora-alpha", "8", "--lora-dropout", "0"], (8, 8, 0, 2e-4, 2e-5)),
        ([], (None, None, None, 2e-5, None)),
    ):
        args = train.make_parser().parse_args([*words, *given])
        settings.settle_lora(args, train.STAGES["stage2"])
        assert (args.lora, args.lora_alpha, args.lora_dropout, args.lr, args.projector_lr) == expected


def test_the_two_rates_are_those_of_adapters_and_projector(trainer, talks, aligned, tmp_path, monkeypatch):
    """AdamW's first step moves each number by the rate: B from zero, and the projector from where it was."""
    moved, merge = {}, lora.merge

    def look(model):
        moved.update({name: adapted.B.abs().max().item() for name, adapted in lora.adapters(model.language)})
        merge(model)

    monkeypatch.setattr(lora, "merge", look)
    words = ("--lora", 4, "--steps", 1, "--warmup", 0, "--lr", 1e-3, "--projector-lr", 4e-3)
    assert trainer.stage(2, talks, tmp_path / "out", "--model", aligned, *words) == 0
    assert len(moved) == 14 and max(moved.values()) == pytest.approx(1e-3, rel=1e-2)
    difference = load(tmp_path / "out").projector.weight - load(aligned).projector.weight
    assert difference.abs().max().item() == pytest.approx(4e-3, rel=1e-2)


def test_dropout_is_on_in_steps_and_off_in_validation_and_in_the_result(trainer, talks, aligned, tmp_path, monkeypatch):
    seen, dropout = [], F.dropout

    def look(x, p, training):
        seen.append((p, training, torch.is_grad_enabled()))
        return dropout(x, p, training)

    monkeypatch.setattr(F, "dropout", look)
    words = ("--lora", 4, "--lora-dropout", 0.5, "--steps", 2, "--val-every", 1, "--val-fraction", 0.2)
    assert trainer.stage(2, talks, tmp_path / "out", "--model", aligned, *words) == 0
    assert set(seen) == {(0.5, True, True), (0.5, False, False)}


# ---------------------------------------------------------------- the folder


def test_the_result_is_the_merged_model_whole_and_plain(trainer, talks, aligned, tmp_path, monkeypatch):
    """Its logits are those of base and adapters side by side, just before."""
    found, merge = {}, lora.merge
    ids, pixels = torch.tensor([[1, 20, -200, 40, 7, 300]]), torch.randn(1, 3, 16, 16)

    def look(model):
        found["sided"] = model.eval()(ids, pixels)
        merge(model)
        found["kinds"] = {type(module) for module in model.modules()}

    monkeypatch.setattr(lora, "merge", look)
    assert trainer.stage(2, talks, tmp_path / "out", "--model", aligned, *WORDS, "--lora-alpha", 64) == 0
    merged = load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids, pixels), found["sided"].detach(), rtol=2e-5, atol=2e-5)
        assert (load(aligned)(ids, pixels) - found["sided"]).abs().max() > 0.01  # it would show
    assert lora.LoRALinear not in found["kinds"] and not merged.training
    assert merged.config.stage == "stage2" and merged.tokenizer is not None
    stored = {name: str(tensor.dtype) for name, tensor in files.tensors(tmp_path / "out" / "model.safetensors")}
    assert set(stored.values()) == {"torch.float32"}
    assert not any("lora" in name or "base" in name for name in stored)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert not names & {"training.pt", "adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"}


def test_a_base_in_bfloat16_gives_a_result_in_bfloat16(aligned, tmp_path):
    """What a run on CUDA does, by hand: adapters and projector are float32 as long as they learn."""
    model = load(aligned, dtype=torch.bfloat16)
    lora.adapt(model, 4, 8, 0.0)
    learnt = {p.dtype for p in [*model.projector.parameters(), *(a.B for _, a in lora.adapters(model.language))]}
    assert learnt == {torch.float32}
    weight = model.language.layers[0].mlp.up_proj
    weight.B.data.normal_()
    expected = (weight.base.weight.float() + 2 * weight.B @ weight.A).bfloat16()
    lora.merge(model)
    assert torch.equal(model.language.layers[0].mlp.up_proj.weight, expected)
    save(model, tmp_path / "out")
    dtypes = {tensor.dtype for _, tensor in files.tensors(tmp_path / "out" / "model.safetensors")}
    assert dtypes == {torch.bfloat16}


def test_while_it_goes_on_the_folder_is_an_official_lora_run_over_its_base(cut, aligned, tmp_path):
    """It loads as such, the base found beside it by its name; and no weight of the base is in it."""
    names = {file.name for file in cut.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin", "training.pt"} <= names
    assert "model.safetensors" not in names
    (cut / "training.pt").unlink()
    model, base = load(cut), load(aligned)
    assert model.config.stage == "stage2" and model.tokenizer is not None
    halves = dict(files.tensors(cut / "adapter_model.safetensors"))
    prefix = "base_model.model.model.layers.1.mlp.down_proj.lora_"
    update = 2 * halves[f"{prefix}B.weight"] @ halves[f"{prefix}A.weight"]
    expected = base.language.layers[1].mlp.down_proj.weight + update
    torch.testing.assert_close(model.language.layers[1].mlp.down_proj.weight, expected)
    assert update.abs().max() > 1e-3 and not torch.equal(model.projector.weight, base.projector.weight)


# ---------------------------------------------------------------- resuming


def test_a_resumed_run_gives_losses_and_weights_bit_for_bit(trainer, talks, aligned, cut, undisturbed, capsys):
    assert len(metrics(cut)) == 3
    assert trainer.stage(2, talks, cut, "--model", aligned, *WORDS, "--resume") == 0
    assert "resuming at step 3 of 9" in capsys.readouterr().out
    assert metrics(cut) == metrics(undisturbed) and len(metrics(cut)) == 9
    mine, theirs = load(cut).state_dict(), load(undisturbed).state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert not {file.name for file in cut.iterdir()} & {"training.pt", "adapter_config.json"}


def test_each_process_draws_its_own_dropout_and_a_resumed_one_the_same(aligned, monkeypatch):
    model, draws = load(aligned), {}
    for rank, seed, step in [(r, s, t) for r in (0, 1, 7) for s in (0, 5) for t in (1, 2)]:
        monkeypatch.setattr(lora.distributed, "rank", lambda rank=rank: rank)
        for _ in range(2):
            lora.seed_dropout(model, seed, step)
            draws.setdefault((rank, seed, step), []).append(torch.rand(9))
    assert all(torch.equal(*pair) for pair in draws.values())
    assert len({tuple(first.tolist()) for first, _ in draws.values()}) == 12


def test_the_seed_changes_what_dropout_draws(trainer, talks, aligned, undisturbed, tmp_path):
    """Or the test above would prove nothing of it."""
    assert trainer.stage(2, talks, tmp_path / "out", "--model", aligned, *WORDS, "--lora-dropout", 0) == 0
    ours, theirs = metrics(tmp_path / "out"), metrics(undisturbed)
    assert ours[0] != theirs[0] or ours[1] != theirs[1]
    assert ours[-1] != theirs[-1]


def test_a_run_is_not_resumed_over_another_base(trainer, talks, aligned, cut, tmp_path, capsys):
    """One number of one frozen matrix differs."""
    model = load(aligned)
    with torch.no_grad():
        model.language.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    save(model, tmp_path / "other")
    status = trainer.stage(2, talks, cut, "--model", tmp_path / "other", *WORDS, "--resume")
    refused(capsys, status, "different base", "checksum")
    status = trainer.stage(2, talks, cut, "--model", tmp_path / "stage1", *WORDS, "--resume")  # the same, elsewhere
    assert status == 0


def test_a_run_is_not_resumed_with_another_rank_or_without_adapters(trainer, talks, aligned, cut, capsys):
    words = list(WORDS)
    for value in (["--lora", 5], ["--lora", 4, "--lora-alpha", 3], ["--lora", 4, "--lora-dropout", 0], []):
        status = trainer.stage(2, talks, cut, "--model", aligned, *value, *words[2:], "--resume")
        refused(capsys, status, str(cut), value[-2].lstrip("-").replace("-", "_") if value else "lora was 4, now None")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "non_lora_trainables.bin"])
@pytest.mark.parametrize("kind", ["cut", "misshapen"])
def test_damaged_adapters_are_one_line(name, kind, trainer, talks, aligned, cut, capsys):
    file = cut / name
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:100])
    else:
        tensors = {key: tensor[..., :1].clone() for key, tensor in files.tensors(file)}
        lora.save_file(tensors, file) if file.suffix != ".bin" else torch.save(tensors, file)
    refused(capsys, trainer.stage(2, talks, cut, "--model", aligned, *WORDS, "--resume"), "damaged")


def test_the_checksum_knows_every_frozen_tensor(aligned):
    model = load(aligned)
    freeze(model, STAGES["stage2"])
    lora.adapt(model, 4, 8, 0.0)
    before = lora.base_checksum(model)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert len(frozen) > 40 and lora.base_checksum(model) == before
    for p in frozen:
        kept = p.data.flatten()[0].clone()
        p.data.view(-1)[0] = torch.nextafter(kept, kept + 1)
        assert lora.base_checksum(model) != before
        p.data.view(-1)[0] = kept
    model.projector.weight.data.add_(1)
    assert lora.base_checksum(model) == before


# ---------------------------------------------------------------- what is refused

REFUSED = {
    "rank 0": (("--lora", 0), ("--lora is 0", "above 0")),
    "negative": (("--lora=-3",), ("--lora is -3",)),
    "too large": (("--lora", 17), ("--lora 17", "16", "at most")),
    "the default": (("--lora",), ("--lora 128", "16 at most")),
    "muon": (("--lora", 4, "--optimizer", "muon"), ("--lora", "--optimizer muon")),
    "in threads": (("--lora", 4, "--parallel", 2), ("--lora-dropout 0",)),
    "alpha alone": (("--lora-alpha", 4), ("give --lora too",)),
    "dropout alone": (("--lora-dropout", 0.0), ("give --lora too",)),
    "alpha 0": (("--lora", 4, "--lora-alpha", 0), ("--lora-alpha is 0",)),
    "alpha": (("--lora", 4, "--lora-alpha", 1e7), ("--lora-alpha is", "below a million")),
    "dropout": (("--lora", 4, "--lora-dropout", 1), ("--lora-dropout is 1",)),
}


@pytest.mark.parametrize(("words", "told"), REFUSED.values(), ids=REFUSED)
def test_settings_that_cannot_be_are_one_line(words, told, trainer, talks, aligned, tmp_path, capsys):
    refused(capsys, trainer.stage(2, talks, tmp_path / "out", "--model", aligned, *words), *told)
    assert not (tmp_path / "out").exists()


def test_stage_1_has_no_adapters(trainer, talks, tmp_path, capsys):
    refused(capsys, trainer.stage(1, talks, tmp_path / "out", "--lora", 4), "--lora with stage1", "stage2")


def test_parts_side_by_side_give_the_same_without_dropout(trainer, talks, aligned, tmp_path):
    words = ("--lora", 4, "--lora-dropout", 0, "--steps", 2, "--max-length", 150)
    for name, more in (("one", ()), ("two", ("--parallel", 2))):
        assert trainer.stage(2, talks, tmp_path / name, "--model", aligned, *words, *more) == 0
    losses = [[entry[1] for entry in metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_from_a_clip_and_a_vicuna(trainer, talks, tmp_path):
    """No --model: the base is the Vicuna, and the folder of a run that was stopped names it."""
    assert trainer.stage(2, talks, tmp_path / "out", "--lora", 4, "--steps", 2, "--save-every", 1) == 0
    assert load(tmp_path / "out").config.stage == "stage2"
    assert resume.progress(tmp_path / "out") == "finished"
