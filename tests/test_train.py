"""The training commands as they are typed: loss and rates by hand, resuming bit for bit, and all that can be wrong.

The oracle for losses and gradients takes each record alone through `encode` and the plain forward pass.
"""

import errno
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train
from nanollava import attention, checkpoint, weights
from nanollava.checkpoint import load
from nanollava.conversation import IGNORE, encode, messages_from_record
from nanollava.images import preprocess
from nanollava.llama import Llama, LlamaConfig
from nanollava.llava import Llava
from nanollava.tokenizer import IMAGE_TOKEN_ID as IMAGE
from nanollava.tokenizer import load_tokenizer
from nanollava.train import blocks, loop, resume
from nanollava.train.data import Dataset, draw_steps
from nanollava.train.machine import check_bfloat16, share_cores
from nanollava.train.records import Example
from nanollava.train.stages import PARTS, STAGES, precision
from nanollava.vit import VisionConfig, VisionTransformer

N = 4  # patches of an image


def record(name: str, image: str | list[str] | None, *turns: str) -> dict:
    """An official record: human and gpt in turn."""
    conversations = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": name, **({"image": image} if image else {}), "conversations": conversations}


CAPTIONS = [record(f"c{i}", f"{name}.png", "<image>", f"A ball and {i} stars.") for i, name in enumerate("abcd")]
TALKS = [
    record("a1", "a.png", "<image>\nWhat color is the ball?", "The ball is blue."),
    record("t1", None, "What is a square?", "It has four sides."),
    record("a2", "a.png", "<image>\nWhat color is the star?", "Red."),
    record("b1", "b.png", "What is this?\n<image>", "A star.", "And its size?", "It is small."),
    record("a3", "a.png", "<image>\nIs there a circle?", "There are three: a big green one and two small ones."),
    record("t2", None, "What is a circle?", "It is round."),
]
MODEL_LINE = re.compile(
    r"stage1 +(\d+)/40  loss \d+\.\d{4}  [\d,]+ tokens/s  padding \d+%  waiting for data \d+%  "
    r"\d+\.\d GB  \d+:\d\d left"
)


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """A function: records -> a JSON file of them."""

    def write(records: list, name: str = "records.json") -> Path:
        file = tmp_path_factory.mktemp("data") / name
        file.write_text(json.dumps(records), encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="module")
def captions(write) -> Path:
    return write(CAPTIONS)


@pytest.fixture(scope="module")
def talks(write) -> Path:
    return write(TALKS)


@pytest.fixture(scope="module")
def aligned(trainer, captions) -> Path:
    """The result of a short stage 1: what stage 2 begins with."""
    assert trainer.stage(1, captions, captions.parent / "stage1", "--steps", 2, "--batch-size", 2) == 0
    return captions.parent / "stage1"


def metrics(folder: Path, *names: str) -> list:
    """The lines of metrics.jsonl: whole, or the named fields of each."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(entry[name] for name in names) for entry in entries] if names else entries


def refused(capsys, status: int, *words: str) -> str:
    """The last line on stderr, after seeing that the command ended as a user's mistake does: status 2, no traceback."""
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and lines[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in lines) == 1 and not any("Traceback" in line for line in lines)
    for word in words:
        assert word in "\n".join(lines)
    return lines[-1]


def one_by_one(model: Llava, records: list[dict], images: Path) -> tuple[torch.Tensor, int]:
    """Summed loss and number of targets of records that never met."""
    total, count = torch.zeros(()), 0
    for item in records:
        names = [item["image"]] if "image" in item else []
        token_ids, labels = encode(messages_from_record(item), model.tokenizer, "vicuna_v1", images=len(names))
        wide = [x for t, label in zip(token_ids, labels, strict=True) for x in [label] * (N if t == IMAGE else 1)]
        pixels = [preprocess(Image.open(images / name), 16, "crop") for name in names]
        logits = model(torch.tensor([token_ids]), torch.stack(pixels) if pixels else None)[0]
        total = total + F.cross_entropy(logits[:-1], torch.tensor(wide[1:]), ignore_index=IGNORE, reduction="sum")
        count += sum(label != IGNORE for label in labels)
    return total, count


@pytest.fixture
def gradients():
    """The gradients of all optimizer steps that follow, a list of tensors for each step."""
    steps = []

    def remember(optimizer, *_):
        steps.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    handle = register_optimizer_step_pre_hook(remember)
    yield steps
    handle.remove()


# ---------------------------------------------------------------- one step by hand


HOW = {
    "all at once": (),
    "one row at a time": ("--rows-at-once", 1),
    "short rows": ("--max-length", 150),
    "short rows one at a time": ("--max-length", 150, "--rows-at-once", 1),
    "shared images": ("--share-images",),
    "shared images, one row at a time": ("--share-images", "--max-length", 150, "--rows-at-once", 1),
    "three parts side by side": ("--max-length", 150, "--parallel", 3),
    "one row at a time, two side by side": ("--max-length", 150, "--rows-at-once", 1, "--parallel", 2),
}


@pytest.mark.parametrize("words", HOW.values(), ids=HOW)
def test_a_step_is_the_mean_over_all_its_targets_however_it_is_cut(words, trainer, talks, aligned, tmp_path, gradients):
    """Loss and gradients of one step against the records one by one; a, b and the two texts are four groups."""
    size = 4 if "--share-images" in words else 6
    settings = ("--steps", 1, "--warmup", 0, "--clip", 1e9, "--batch-size", size)
    assert trainer.stage(2, talks, tmp_path / "out", "--model", aligned, *settings, *words) == 0
    model = load(aligned)
    total, count = one_by_one(model, TALKS, trainer.images)
    parameters = [*model.projector.parameters(), *model.language.parameters()]
    expected = torch.autograd.grad(total / count, parameters)
    ((loss, norm),) = metrics(tmp_path / "out", "loss", "grad_norm")
    assert loss == pytest.approx(total.item() / count, rel=1e-5)
    assert norm == pytest.approx(sum(g.square().sum().item() for g in expected) ** 0.5, rel=1e-4)
    (found,) = gradients
    torch.testing.assert_close(found, list(expected), rtol=1e-3, atol=1e-6)


def test_gradients_are_clipped_and_the_metrics_hold_their_norm_before(trainer, talks, aligned, tmp_path, gradients):
    words = ("--model", aligned, "--steps", 1, "--warmup", 0)
    assert trainer.stage(2, talks, tmp_path / "free", *words, "--clip", 1e9) == 0
    assert trainer.stage(2, talks, tmp_path / "clipped", *words, "--clip", 0.01) == 0
    norms = [sum(g.square().sum().item() for g in step) ** 0.5 for step in gradients]
    assert norms[0] > 0.1 and norms[1] == pytest.approx(0.01, rel=1e-3)
    for folder in ("free", "clipped"):
        assert metrics(tmp_path / folder, "grad_norm") == [(pytest.approx(norms[0], rel=1e-4),)]


def test_the_projector_has_its_own_rate(trainer, talks, aligned, tmp_path):
    """AdamW's first step moves each number by the rate, up or down (where its gradient is far above eps)."""
    words = ("--model", aligned, "--steps", 1, "--warmup", 0, "--lr", 1e-3, "--projector-lr", 4e-3)
    assert trainer.stage(2, talks, tmp_path / "out", *words) == 0
    before, after = load(aligned), load(tmp_path / "out")
    for part, rate in (("projector", 4e-3), ("language", 1e-3)):
        pairs = zip(getattr(before, part).parameters(), getattr(after, part).parameters(), strict=True)
        assert max((a - b).abs().max().item() for a, b in pairs) == pytest.approx(rate, rel=1e-2)
    assert metrics(tmp_path / "out", "lr", "projector_lr") == [(1e-3, 4e-3)]


# ---------------------------------------------------------------- what a run tells


def test_metrics_have_a_line_for_each_step_and_the_terminal_one_for_some(trainer, captions, tmp_path, capsys):
    """40 steps: 3% is 1.2, so two of warm-up, then a cosine over the other 38."""
    words = ("--steps", 40, "--batch-size", 2, "--lr", 1e-3, "--log-every", 15, "--save-every", 0)
    assert trainer.stage(1, captions, tmp_path / "out", *words) == 0
    rates = [0.0, 0.5e-3] + [1e-3 * 0.5 * (1 + math.cos(math.pi * i / 38)) for i in range(38)]
    entries = metrics(tmp_path / "out")
    assert [entry["step"] for entry in entries] == list(range(1, 41))
    assert [entry["lr"] for entry in entries] == pytest.approx(rates, abs=1e-12)
    for entry in entries:
        assert entry.keys() == {"step", "loss", "lr", "projector_lr", "grad_norm", "padding", "tokens_per_s"}
        assert 0 < entry["loss"] < 20 and entry["grad_norm"] > 0 and entry["tokens_per_s"] > 0
    shown = [match[1] for line in capsys.readouterr().out.splitlines() if (match := MODEL_LINE.fullmatch(line))]
    assert shown == ["1", "15", "30", "40"]


def test_padding_is_counted_in_each_step_and_over_the_run(trainer, write, tmp_path, capsys):
    """Steps of one caption each, rows rounded up to 64 positions: n of them are something."""
    longer = [record(f"c{i}", "a.png", "<image>", "A ball. " * i) for i in (1, 5, 20)]
    data, words = write(longer), ("--batch-size", 1, "--epochs", 2, "--log-every", 2)
    assert trainer.stage(1, data, tmp_path / "out", *words) == 0
    tokenizer = load_tokenizer(trainer.vicuna)
    filled = [len(encode(messages_from_record(r), tokenizer, "plain", images=1)[0]) + N - 1 for r in longer]
    rows = [-(-n // 64) * 64 for n in filled]
    assert len(set(rows)) > 1
    shares = [share for (share,) in metrics(tmp_path / "out", "padding")]
    assert (
        sorted(shares[:3])
        == sorted(shares[3:])
        == [
            pytest.approx(share, abs=1e-4) for share in sorted(1 - n / row for n, row in zip(filled, rows, strict=True))
        ]
    )
    last = capsys.readouterr().out.split("stage1     6/6")[1]
    assert f"padding {100 * (1 - sum(filled) / sum(rows)):.0f}%" in last  # over the run, not of its last step


def test_batches_are_made_ahead_of_the_step_in_order(trainer, talks, aligned, tmp_path, monkeypatch):
    """While each step is trained on, those of the next three get ready; no more than these."""
    make, update, made, ready = Dataset.batches, loop.Run.update, [], []

    def count(self, *rest):
        made.append(rest[0])
        return make(self, *rest)

    def wait(self, batches):
        enough = min(self.step + 1 + loop.AHEAD, 8)
        until = time.monotonic() + 10
        while len(made) < enough and time.monotonic() < until:
            time.sleep(0.01)
        ready.append(len(made) - enough)
        return update(self, batches)

    monkeypatch.setattr(Dataset, "batches", count)
    monkeypatch.setattr(loop.Run, "update", wait)
    words = ("--model", aligned, "--steps", 8, "--batch-size", 2)
    assert trainer.stage(2, talks, tmp_path / "out", *words) == 0
    drawn = draw_steps(len(TALKS), 2, 0)
    assert ready == [0] * 8 and made == [next(drawn) for _ in range(8)]


def test_the_validation_loss_is_that_of_its_records_one_by_one(trainer, talks, aligned, write, tmp_path):
    val = [record("v1", "c.png", "<image>\nWhat?", "A ball."), record("v2", None, "One?", "Two, and three stars.")]
    words = ("--model", aligned, "--val", write(val), "--steps", 5, "--val-every", 2, "--batch-size", 1)
    assert trainer.stage(2, talks, tmp_path / "out", *words) == 0
    entries = metrics(tmp_path / "out")
    assert [entry["step"] for entry in entries if "val_loss" in entry] == [2, 4, 5]
    with torch.no_grad():
        total, count = one_by_one(load(tmp_path / "out"), val, trainer.images)
    assert entries[-1]["val_loss"] == pytest.approx(total.item() / count, rel=1e-5)
    assert entries[1]["val_loss"] != entries[-1]["val_loss"]


def test_records_held_out_for_validation_are_never_trained_on(trainer, write, aligned, tmp_path, monkeypatch):
    """A quarter of 12 records; the same ones for the same seed."""
    data = write([record(str(i), None, f"What is {i}?", f"It is {i}.") for i in range(12)])
    met: dict[int, set[str]] = {}
    batches = Dataset.batches

    def spy(self, numbers, *rest):
        numbers = list(numbers)
        texts = (load_tokenizer(aligned).decode(e.token_ids) for n in numbers for e in self.groups[n])
        met.setdefault(id(self), set()).update(text.split("What is ")[1].split("?")[0] for text in texts)
        return batches(self, numbers, *rest)

    monkeypatch.setattr(Dataset, "batches", spy)
    kept = []
    for seed in (0, 0, 1):
        met.clear()
        out = tmp_path / f"out{len(kept)}"
        words = ("--val-fraction", 0.25, "--steps", 6, "--batch-size", 3, "--seed", seed)
        assert trainer.stage(2, data, out, "--model", aligned, *words) == 0
        trained, held = sorted(met.values(), key=len, reverse=True)
        assert len(held) == 3 and trained | held == {str(i) for i in range(12)} and not trained & held
        kept.append(held)
    assert kept[0] == kept[1] != kept[2]


def test_what_is_known_of_an_image_is_held_out_or_trained_on_but_not_both():
    def about(*images):
        return [Example(np.array([1]), np.array([1]), images)]

    groups = [about("a"), about("b"), about("a", "a"), about(), about("c"), about("b"), about(), about("d", "b")]
    groups += [about("e", "f"), about("f", "g"), about("g"), about("d"), about("h")]
    for seed in range(20):
        trained, held = train.hold_out(groups, 0.3, seed)
        assert held and trained and sorted(map(id, trained + held)) == sorted(map(id, groups))
        assert not {n for g in trained for n in g[0].images} & {n for g in held for n in g[0].images}
    assert len({tuple(map(id, train.hold_out(groups, 0.3, seed)[1])) for seed in range(20)}) > 3


# ---------------------------------------------------------------- going on where a run was cut


STAGE_2 = ("--steps", 9, "--batch-size", 2, "--save-every", 3, "--lr", 1e-2, "--optimizer", "muon", "--log-every", 1)
SAME = ("step", "loss", "lr", "grad_norm")
KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(2)
import train
from nanollava.train import resume
write, saves = resume.write, []
def killed(model, folder):
    write(model, folder)
    saves.append(folder)
    if len(saves) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
resume.write = killed
train.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def undisturbed(trainer, talks, aligned) -> Path:
    out = talks.parent / "undisturbed"
    assert trainer.stage(2, talks, out, "--model", aligned, *STAGE_2) == 0
    return out


@contextmanager
def ctrl_c_at(step: int, monkeypatch):
    """Ctrl-C as a step is reported."""
    report = loop.Run.report

    def interrupted(self, *rest):
        if self.step == step:
            raise KeyboardInterrupt
        report(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "report", interrupted)
        yield


@pytest.fixture
def cut(trainer, talks, aligned, tmp_path, monkeypatch, capsys) -> Path:
    """A run that Ctrl-C ended at step 5 of 9; its last checkpoint is of step 3."""
    with ctrl_c_at(5, monkeypatch):
        assert trainer.stage(2, talks, tmp_path / "cut", "--model", aligned, *STAGE_2) == 130
    assert "--resume" in capsys.readouterr().err
    return tmp_path / "cut"


def same_result(a: Path, b: Path) -> bool:
    """Whether two runs gave the same losses and weights, bit for bit."""
    mine, theirs = load(a).state_dict(), load(b).state_dict()
    same = all(torch.equal(mine[name], theirs[name]) for name in theirs)
    return same and metrics(a, *SAME) == metrics(b, *SAME)


def test_a_resumed_run_gives_the_losses_of_an_undisturbed_one_bit_for_bit(
    trainer, talks, aligned, cut, undisturbed, capsys
):
    assert len(metrics(cut)) == 3 and load(cut).config.stage == "stage2"  # a checkpoint like any other
    assert trainer.stage(2, talks, cut, "--model", aligned, *STAGE_2, "--resume") == 0
    assert "resuming at step 3 of 9" in capsys.readouterr().out
    assert len(metrics(undisturbed)) == 9 and same_result(cut, undisturbed)
    assert not (cut / "training.pt").exists()


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_ctrl_c_ends_the_step_saves_and_is_resumed(trainer, talks, aligned, undisturbed, tmp_path, monkeypatch, capsys):
    """In the middle of the fifth step; the last checkpoint asked for would be that of step 3."""
    update = loop.Run.update

    def pressed(self, batches):
        if self.step == 4:
            signal.raise_signal(signal.SIGINT)
        return update(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "update", pressed)
        assert trainer.stage(2, talks, tmp_path / "out", "--model", aligned, *STAGE_2) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted: go on with the same command and --resume"
    assert len(metrics(tmp_path / "out")) == 5 and signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert trainer.stage(2, talks, tmp_path / "out", "--model", aligned, *STAGE_2, "--resume") == 0
    assert same_result(tmp_path / "out", undisturbed)


def test_ctrl_c_before_anything_is_saved_does_not_speak_of_resuming(
    trainer, talks, aligned, tmp_path, monkeypatch, capsys
):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Run, "run", pressed)
    assert trainer.stage(2, talks, tmp_path / "out", "--model", aligned) == 130
    assert capsys.readouterr().err.strip() == "interrupted: go on with the same command"


def test_what_the_system_refuses_is_one_line(trainer, talks, aligned, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(28, "No space left on device", "/full/disk")

    monkeypatch.setattr(loop.Run, "run", refuse)
    refused(capsys, trainer.stage(2, talks, tmp_path / "out", "--model", aligned), "/full/disk", "No space left")


LOGS = {
    "empty": lambda lines: [],
    "an empty line": lambda lines: [b""],
    "cut": lambda lines: [*lines[:2], lines[2][:9]],
    "no text": lambda lines: [b"\xff\xfe", *lines[1:]],
    "too few": lambda lines: lines[:2],
    "one missing": lambda lines: [lines[0], lines[2]],
    "too many": lambda lines: [b'{"step": 0}', *lines, b'{"step": 4}'],
    "no objects": lambda lines: [b"1", b"null", b"[]"],
    "a list": lambda lines: [*lines[:2], b"[3]"],
    "no step": lambda lines: [b"{}"] * 3,
}


@pytest.mark.parametrize("damage", LOGS.values(), ids=LOGS)
def test_damaged_metrics_are_one_line_and_cost_no_checkpoint(damage, trainer, talks, aligned, undisturbed, cut, capsys):
    file = cut / "metrics.jsonl"
    file.write_bytes(b"".join(line + b"\n" for line in damage(file.read_bytes().splitlines())))
    again = (2, talks, cut, "--model", aligned, *STAGE_2, "--resume")
    refused(capsys, trainer.stage(*again), f"{file}: not a line for every step up to 3; delete it")
    file.unlink()
    assert trainer.stage(*again) == 0
    assert metrics(cut, *SAME) == metrics(undisturbed, *SAME)[3:]


def test_a_run_without_the_begin_of_its_log_is_resumed_once_more(
    trainer, talks, aligned, cut, undisturbed, monkeypatch
):
    (cut / "metrics.jsonl").unlink()
    again = (2, talks, cut, "--model", aligned, *STAGE_2, "--resume")
    with ctrl_c_at(8, monkeypatch):
        assert trainer.stage(*again) == 130
    assert metrics(cut, *SAME) == metrics(undisturbed, *SAME)[3:6]
    assert trainer.stage(*again) == 0
    assert metrics(cut, *SAME) == metrics(undisturbed, *SAME)[3:]


@pytest.mark.parametrize("state", [[], {}, {"optimizers": []}, {"step": 9}, {"step": "x"}], ids=str)
def test_training_state_with_something_missing_is_one_line(state, trainer, talks, aligned, cut, capsys):
    whole = torch.load(cut / "training.pt", weights_only=True)
    kept = {k: v for k, v in whole.items() if k not in ("optimizers", "step")}
    torch.save(kept | {"step": 3} | state if isinstance(state, dict) else state, cut / "training.pt")
    refused(capsys, trainer.stage(2, talks, cut, "--model", aligned, *STAGE_2, "--resume"), str(cut), "damaged")


def test_a_kill_in_the_middle_of_saving_loses_nothing(trainer, talks, aligned, undisturbed, tmp_path):
    """kill -9 from inside the second save: the first one is whole, and the run goes on from there."""
    out = tmp_path / "killed"
    start = ("--data", talks, "--images", trainer.images, "--out", out, "--model", aligned, "--device", "cpu")
    words = [str(word) for word in ("stage2", *start, *STAGE_2)]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], cwd=Path(__file__).parents[1], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(os.listdir(tmp_path)) == [".killed.lock", ".killed.saving", "killed"]
    assert len(metrics(out)) == 3
    assert trainer.stage(2, talks, out, "--model", aligned, *STAGE_2, "--resume") == 0
    assert same_result(out, undisturbed) and os.listdir(tmp_path) == ["killed"]


def test_a_kill_between_the_two_renames_loses_nothing(trainer, talks, aligned, cut, undisturbed, tmp_path):
    shutil.copytree(cut, tmp_path / ".cut.previous")
    cut.rename(tmp_path / ".cut.saving")
    assert trainer.stage(2, talks, cut, "--model", aligned, *STAGE_2, "--resume") == 0
    assert same_result(cut, undisturbed)


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_line_and_the_last_checkpoint_goes_on(
    trainer, talks, aligned, undisturbed, tmp_path, monkeypatch, capsys
):
    out, save_file, saves = tmp_path / "out", weights.save_file, []

    def fills_up(tensors, file, **rest):
        saves.append(file)
        (full_disk if len(saves) == 2 else save_file)(tensors, file, **rest)

    monkeypatch.setattr(weights, "save_file", fills_up)
    status = trainer.stage(2, talks, out, "--model", aligned, *STAGE_2)
    assert "No space left" in refused(capsys, status, str(out), "intact")
    assert len(metrics(out)) == 3 and os.listdir(tmp_path) == ["out"]
    assert trainer.stage(2, talks, out, "--model", aligned, *STAGE_2, "--resume") == 0
    assert same_result(out, undisturbed)


def test_a_disk_full_of_optimizer_state_is_one_line_too(trainer, talks, aligned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "save", full_disk)
    status = trainer.stage(2, talks, tmp_path / "out", "--model", aligned, *STAGE_2)
    refused(capsys, status, "No space left")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("batch_size", [1, 3, 5, 12])
def test_batches_after_a_cut_are_those_of_an_undisturbed_run(batch_size):
    """Batches within an epoch, across epochs, and larger than one; every epoch has each group once."""
    stream = draw_steps(5, batch_size, seed=3)
    batches = [next(stream) for _ in range(20)]
    for skip in range(20):
        assert next(draw_steps(5, batch_size, 3, skip)) == batches[skip]
    flat = [number for batch in batches for number in batch]
    epochs = [tuple(flat[i : i + 5]) for i in range(0, len(flat) - 4, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs) and len(set(epochs)) > 1
    assert next(draw_steps(50, 50, seed=3)) != next(draw_steps(50, 50, seed=4))


# ---------------------------------------------------------------- an --out that does not suit


def test_a_run_never_overwrites_what_is_there(trainer, captions, talks, aligned, cut, tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "important.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, words in ((aligned, "choose another --out"), (cut, "--resume"), (tmp_path / "notes", "another --out")):
        before = {file: file.read_bytes() for file in out.rglob("*")}
        assert words in refused(capsys, trainer.stage(1, captions, out, "--steps", 1), str(out))
        assert {file: file.read_bytes() for file in out.rglob("*")} == before
    refused(capsys, trainer.stage(1, captions, tmp_path / "file", "--steps", 1), "another --out")
    refused(capsys, trainer.stage(1, captions, tmp_path / "file" / "out", "--steps", 1), "choose another folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_out_that_does_not_suit_is_said_before_anything_is_read(trainer, aligned, tmp_path, capsys):
    refused(capsys, trainer.stage(1, tmp_path / "no.json", aligned), f"{aligned} exists")


OTHER = {
    "rate": ("--lr", 2e-2),
    "seed": ("--seed", 1),
    "batch": ("--batch-size", 3),
    "length": ("--max-length", 200),
    "squares": ("--image-aspect-ratio", "pad"),
    "steps": ("--steps", 12),
    "optimizer": ("--optimizer", "adamw"),
    "grouping": ("--share-images",),
}


@pytest.mark.parametrize("words", OTHER.values(), ids=OTHER)
def test_a_run_is_not_resumed_with_other_settings(words, trainer, talks, aligned, cut, capsys):
    before = (cut / "training.pt").read_bytes()
    status = trainer.stage(2, talks, cut, "--model", aligned, *STAGE_2, *words, "--resume")
    line = refused(capsys, status, str(cut))
    name = words[0][2:].replace("-", "_")
    assert ("data was" if name == "share_images" else f"{name} was") in line.replace("different data: ", "data was ")
    assert "give the same" in line and "or another --out" in line
    if name in ("share_images", "max_length", "image_aspect_ratio"):
        assert words[0] in line.partition("give the same")[2]
    assert (cut / "training.pt").read_bytes() == before


def test_a_run_is_not_resumed_with_other_records_of_the_same_number(trainer, aligned, cut, write, capsys):
    """Another word, another image: each would silently give other losses."""
    for change in ("The ball is red.", "b.png"):
        texts = json.dumps(TALKS).replace("The ball is blue.", change) if " " in change else None
        others = json.loads(texts or json.dumps(TALKS).replace("a.png", change))
        status = trainer.stage(2, write(others), cut, "--model", aligned, *STAGE_2, "--resume")
        assert "different data" in refused(capsys, status)


def test_a_run_is_not_resumed_as_another_stage_or_with_another_projector(trainer, captions, tmp_path, cut, capsys):
    status = trainer.stage(1, captions, cut, *STAGE_2, "--resume")
    assert "stage2, not stage1" in refused(capsys, status, str(cut))
    status = trainer.stage(2, captions, cut, *STAGE_2, "--projector", "mlp2x_gelu", "--resume")
    assert "projector_type was linear, now mlp2x_gelu" in refused(capsys, status, str(cut))


def test_a_run_is_not_resumed_with_another_language_model_or_tower(trainer, talks, tmp_path, cut, capsys):
    """The fields in which the two models differ are named, not all that they have."""
    wide, tall = tmp_path / "wide", tmp_path / "tall"
    checkpoint.save_language(Llama(LlamaConfig(400, 48, 16, 3, 2, 1)), load_tokenizer(trainer.vicuna), wide)
    checkpoint.save_vision(VisionTransformer(VisionConfig(24, 8, 16, 16, 2, 2)), tall)
    words = ("--images", trainer.images, "--data", talks, "--out", cut, "--device", "cpu", *STAGE_2, "--resume")
    for vision, language, told in (
        (trainer.clip, wide, "language: hidden_size was 32, now 48, num_hidden_layers was 2, now 3, head_dim was"),
        (tall, trainer.vicuna, "vision: image_size was 16, now 24"),
    ):
        status = trainer("stage2", "--vision", vision, "--language", language, *words)
        line = refused(capsys, status, str(cut), f"different config: {told}")
        assert len(line) < 300 and "vocab_size" not in line


def test_resume_where_nothing_is_left_to_resume_says_so(trainer, captions, aligned, tmp_path, capsys):
    """A finished run of this stage or another; nothing saved yet; a folder that is no run at all."""
    for stage in (1, 2):
        line = refused(capsys, trainer.stage(stage, captions, aligned, "--resume"), str(aligned))
        assert "stage1, finished" in line and "--out" in line
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        line = refused(capsys, trainer.stage(1, captions, tmp_path / name, "--resume"), name)
        assert "no checkpoint was saved there" in line and "without --resume" in line


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "garbage", "cut in half"])
def test_damaged_training_state_is_one_line(content, trainer, talks, aligned, cut, capsys):
    whole = (cut / "training.pt").read_bytes()
    (cut / "training.pt").write_bytes(whole[: len(whole) // 2] if content is None else content)
    status = trainer.stage(2, talks, cut, "--model", aligned, *STAGE_2, "--resume")
    line = refused(capsys, status, "training.pt")
    assert "damaged" in line and "start again" in line
    assert "weights_only" not in line and "checkpoints" not in line  # no advice of torch's; nothing older was kept


def test_a_changed_byte_in_the_training_state_is_found(trainer, talks, aligned, cut, capsys):
    """In the numbers, not in what is told of them: torch.load reads it without a word."""
    content = bytearray((cut / "training.pt").read_bytes())
    moment = torch.load(cut / "training.pt")["optimizers"][0]["state"][0].values()
    place = content.find(next(x for x in moment if x.numel() > 9).numpy().tobytes()) + 5
    content[place] ^= 1
    (cut / "training.pt").write_bytes(content)
    torch.load(cut / "training.pt", weights_only=True)
    refused(capsys, trainer.stage(2, talks, cut, "--model", aligned, *STAGE_2, "--resume"), "training.pt: damaged")


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt"])
def test_where_the_newest_checkpoint_is_damaged_an_older_one_is_named(
    name, trainer, talks, aligned, undisturbed, tmp_path, monkeypatch, capsys
):
    report, out = loop.Run.report, tmp_path / "out"

    def interrupted(self, *rest):
        if self.step == 8:
            raise KeyboardInterrupt
        report(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "report", interrupted)
        assert trainer.stage(2, talks, out, "--model", aligned, *STAGE_2, "--keep", 2) == 130
    (out / name).write_bytes((out / name).read_bytes()[:-9])
    line = refused(capsys, trainer.stage(2, talks, out, "--model", aligned, *STAGE_2, "--resume"), name)
    older = out / "checkpoints" / "step-000003"
    assert f"copy {older} and give the copy as --out" in line and "download" not in line
    shutil.copytree(older, tmp_path / "copy")
    assert trainer.stage(2, talks, tmp_path / "copy", "--model", aligned, *STAGE_2, "--resume") == 0
    assert same_result(tmp_path / "copy", undisturbed)


# ---------------------------------------------------------------- the files that it began with

WRITES = """
import sys
import train
from nanollava.train import loop
file, content, update = sys.argv[1], sys.argv[2], loop.Run.update
def writes(self, batches):
    if self.step == 1:
        with open(file, "wb" if content == "nothing" else "r+b") as model:
            model.write(b"" if content == "nothing" else bytes(int(content)))
    return update(self, batches)
loop.Run.update = writes
sys.exit(train.main(sys.argv[3:]))
"""


@pytest.mark.parametrize("content", ["nothing", "zeros"])
def test_a_run_neither_changes_nor_dies_with_the_file_that_it_began_with(
    content, trainer, talks, aligned, undisturbed, tmp_path
):
    shutil.copytree(aligned, tmp_path / "start")
    file, out = tmp_path / "start" / "model.safetensors", tmp_path / "out"
    start = ("--data", talks, "--images", trainer.images, "--out", out, "--model", file.parent, "--device", "cpu")
    what = "nothing" if content == "nothing" else file.stat().st_size
    words = [str(word) for word in (file, what, "stage2", *start, *STAGE_2)]
    done = subprocess.run([sys.executable, "-c", WRITES, *words], cwd=Path(__file__).parents[1], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert not any(file.read_bytes()) and same_result(out, undisturbed)


# ---------------------------------------------------------------- bad records


def test_settings_of_the_folders_below_are_good(trainer, shelf, write, tmp_path):
    """What the bad records stand beside is accepted, so that they alone are what is refused."""
    for stage in (1, 2):
        assert trainer.stage(stage, write(GOOD), tmp_path / f"{stage}", "--images", shelf, "--steps", 1) == 0


GOOD = [record("good", "a.png", "<image>\nWhat is this?", "A star."), record("fine", "b.png", "<image>", "A ball.")]
ROLES = [{"from": who, "value": "<image> What?"} for who in ("human", "human", "gpt")]
BAD = {
    "roles out of order": ({"id": "x7", "image": "a.png", "conversations": ROLES}, "must be the assistant's"),
    "no gpt turn": (record("x7", "a.png", "<image>\nWhat is this?"), "no gpt turn"),
    "empty answer": (record("x7", "a.png", "<image>\nWhat is this?", " "), "the answer is empty"),
    "more marks than images": (record("x7", ["a.png", "b.png"], "<image><image><image>?", "No."), "3 <image> marks"),
    "image missing": (record("x7", "nowhere.png", "<image>?", "No."), "nowhere.png: the image does not exist"),
    "zero bytes": (record("x7", "zero.png", "<image>?", "No."), "0 bytes"),
    "too large": (record("x7", "huge.png", "<image>?", "No."), "too large"),
    "escaping name": (record("x7", "../images/a.png", "<image>?", "No."), "leads out of the image folder"),
}


@pytest.fixture(scope="module")
def shelf(trainer, tmp_path_factory) -> Path:
    """An image folder with everything in it that pictures can be."""
    shelf = tmp_path_factory.mktemp("shelf") / "images"
    shutil.copytree(trainer.images, shelf)
    (shelf / "zero.png").touch()
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 8_000, 8, 2, 0, 0, 0)
    chunks = b"\0\0\0\x0d" + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\x10IDAT"
    (shelf / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    Image.new("RGB", (20_000, 30), "red").save(shelf / "wide.png")
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(shelf / "moving.gif", save_all=True, append_images=frames[1:])
    content = (shelf / "a.png").read_bytes()
    (shelf / "half.png").write_bytes(content[: len(content) // 2])
    return shelf


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("bad", "words"), BAD.values(), ids=BAD)
def test_a_bad_record_stops_the_run_before_it_starts(bad, words, stage, trainer, shelf, write, tmp_path, capsys):
    data, out = write([GOOD[0], bad, GOOD[1]]), tmp_path / "out"
    status = trainer.stage(stage, data, out, "--images", shelf, "--steps", 1)
    line = refused(capsys, status, "record x7: ", words)
    assert "1 bad records" in line and "--skip-bad" in line and not out.exists()


def test_bad_records_are_skipped_when_asked_for_and_their_list_is_written(trainer, shelf, write, tmp_path, capsys):
    """Of more bad records than fit on a screen every one is in the file; what is trained on are the others."""
    lost = [record(f"lost{i}", "nowhere.png", "<image>?", "No.") for i in range(30)]
    data, val = write([GOOD[0], *lost, GOOD[1]]), write([GOOD[0], lost[0]], "val.json")
    out, words = tmp_path / "runs" / "out", ("--images", shelf, "--steps", 2, "--val", val)
    assert "30 bad records" in refused(capsys, trainer.stage(2, data, out, *words), "record lost0", "and 10 more")
    assert trainer.stage(2, data, out, *words, "--skip-bad") == 0
    printed = capsys.readouterr()
    assert "32 records read" in printed.out and "2 to train on" in printed.out and "out.bad.txt" in printed.out
    listed = [line.split(":")[0] for line in (tmp_path / "runs" / "out.bad.txt").read_text().splitlines()]
    assert listed == [f"record lost{i}" for i in range(30)]
    assert (tmp_path / "runs" / "out.val.bad.txt").read_text().startswith("record lost0: ")


def test_ids_that_no_terminal_can_show_are_listed_all_the_same(trainer, write, shelf, tmp_path, capsys):
    names = ["two\nlines", "half a pair \ud800", "x" * 5000]
    data = write([GOOD[0], *(record(name, "nowhere.png", "<image>?", "No.") for name in names)])
    assert trainer.stage(2, data, tmp_path / "out", "--images", shelf, "--steps", 1, "--skip-bad") == 0
    listed = (tmp_path / "out.bad.txt").read_text().splitlines()
    assert [line[:19] for line in listed] == ["record two\\nlines: ", "record half a pair ", "record " + "x" * 12]
    assert len(capsys.readouterr().err.splitlines()) == 3
    (tmp_path / "list.bad.txt").mkdir()
    status = trainer.stage(2, data, tmp_path / "list", "--images", shelf, "--steps", 1, "--skip-bad")
    assert "cannot be written" in capsys.readouterr().err.splitlines()[-1] and status == 2


def test_images_that_no_mark_points_to_are_counted(trainer, write, tmp_path, capsys):
    data = write([*GOOD, record("blind", "c.png", "What is this?", "A star.")])
    assert trainer.stage(2, data, tmp_path / "out", "--steps", 1) == 0
    assert "no <image> mark points to its image: read as text alone: 1 (blind)" in capsys.readouterr().out


def test_images_that_go_away_in_mid_run_end_it_and_it_goes_on_when_they_are_back(
    trainer, write, shelf, aligned, tmp_path, capsys, monkeypatch
):
    """Not as damaged ones are skipped: a disk that is gone would take all with it."""
    images, data = tmp_path / "images", write(GOOD)
    shutil.copytree(shelf, images)
    words = ("--images", images, "--model", aligned, "--steps", 6, "--save-every", 2, "--batch-size", 1)
    report = loop.Run.report

    def spy(self, entry, last):
        report(self, entry, last)
        if entry["step"] == 2 and images.exists():
            images.rename(tmp_path / "away")

    monkeypatch.setattr(loop.Run, "report", spy)
    assert "bring it back and go on with --resume" in refused(capsys, trainer.stage(2, data, tmp_path / "out", *words))
    (tmp_path / "away").rename(images)
    monkeypatch.setattr(loop.Run, "report", report)
    assert trainer.stage(2, data, tmp_path / "out", *words, "--resume") == 0
    assert len(metrics(tmp_path / "out")) == 6


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
def test_when_nothing_can_be_printed_any_more_the_run_is_saved(error, trainer, talks, aligned, tmp_path, monkeypatch):
    report = loop.Run.report

    def gone(self, entry, last):
        report(self, entry, last)
        if entry["step"] == 2:
            raise error

    words = ("--model", aligned, "--steps", 4, "--batch-size", 2)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "report", gone)
        patch.setattr(os, "dup2", lambda *_: None)
        assert trainer.stage(2, talks, tmp_path / "out", *words) == (1 if isinstance(error, BrokenPipeError) else 2)
    assert trainer.stage(2, talks, tmp_path / "out", *words, "--resume") == 0
    words = ("--model", aligned, "--steps", 2, "--batch-size", 2)  # and in the last step
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "report", gone)
        patch.setattr(os, "dup2", lambda *_: None)
        assert trainer.stage(2, talks, tmp_path / "whole", *words) != 0
    assert resume.progress(tmp_path / "whole") == "finished"


def test_a_step_takes_no_more_than_there_is(trainer, talks, aligned, tmp_path, capsys):
    """A batch of 100,000 of six records would be each of them over and over."""
    assert trainer.stage(2, talks, tmp_path / "out", "--model", aligned, "--steps", 1, "--batch-size", 100_000) == 0
    assert "--batch-size 100000: there are 6 to draw" in capsys.readouterr().out


def test_names_of_images_that_are_no_unicode_are_trained_on_and_saved(trainer, write, aligned, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        shutil.copytree(trainer.images, tmp_path / "images")
        shutil.copy(trainer.images / "a.png", tmp_path / "images" / name)
    except OSError:
        pytest.skip("this disk takes no such name")
    data = write([record("x", name, "<image>\nWhat?", "No.")])
    words = ("--images", tmp_path / "images", "--model", aligned, "--steps", 4, "--save-every", 1)
    assert trainer.stage(2, data, tmp_path / "out", *words) == 0


def test_a_share_for_validation_that_leaves_nothing_is_named(trainer, write, aligned, tmp_path, capsys):
    status = trainer.stage(2, write(GOOD), tmp_path / "out", "--model", aligned, "--val-fraction", 0.99)
    assert "--val-fraction 0.99" in refused(capsys, status)


def test_records_that_end_before_their_answer_are_counted_and_left_out(trainer, write, tmp_path, capsys):
    data = write([record("long", None, "word " * 400, "Yes."), record("short", None, "Word?", "Yes.")])
    words = ("--steps", 4, "--batch-size", 1, "--max-length", 100)
    assert trainer.stage(2, data, tmp_path / "out", *words) == 0
    printed = capsys.readouterr().out
    assert "rows of 100 positions; 1 to train on" in printed and "its end is cut off: 1 (long)" in printed
    assert "cut before the first word of an answer: left out, nothing is learnt from it: 1 (long)" in printed
    assert all(loss > 0 for (loss,) in metrics(tmp_path / "out", "loss"))


def test_records_that_all_end_before_their_answer_are_an_error(trainer, write, tmp_path, capsys):
    data = write([record("long", None, "word " * 400, "Yes.")])
    status = trainer.stage(2, data, tmp_path / "out", "--steps", 1, "--max-length", 100)
    printed = capsys.readouterr()
    assert status == 2 and "nothing is learnt from it: 1 (long)" in printed.out
    assert printed.err.startswith(f"error: {data}: nothing to learn") and "parameters" not in printed.out


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_step_of_damaged_pictures_alone_is_passed_over(parallel, trainer, shelf, write, aligned, tmp_path, capsys):
    """Three steps of one record each; the damaged one changes nothing but is counted."""
    data = write([*GOOD[:2], record("x", "half.png", "<image>\nWhat?", "No.")])
    words = ("--images", shelf, "--steps", 3, "--batch-size", 1, "--model", aligned, "--parallel", parallel)
    assert trainer.stage(2, data, tmp_path / "out", *words) == 0
    losses = [loss for (loss,) in metrics(tmp_path / "out", "loss")]
    assert losses.count(None) == 1 and all(loss > 0 for loss in losses if loss is not None)
    assert "loss none" in capsys.readouterr().out


def test_a_step_without_targets_moves_no_weight(trainer, talks, shelf, write, aligned, tmp_path, monkeypatch):
    """Two steps of which the second is all damage: momentum alone would move weights on."""
    data = write([GOOD[0], record("x", "half.png", "<image>\nWhat?", "No.")])
    monkeypatch.setattr(loop, "draw_steps", lambda groups, size, seed, skip: iter([[0], [1], [1]][skip:]))
    seen, update = [], loop.Run.update

    def spy(self, batches):
        entry = update(self, batches)
        seen.append((entry["loss"], [p.clone() for p in self.model.parameters()]))
        return entry

    monkeypatch.setattr(loop.Run, "update", spy)
    words = ("--images", shelf, "--steps", 2, "--batch-size", 1, "--warmup", 0, "--model", aligned)
    assert trainer.stage(2, data, tmp_path / "out", *words) == 0
    (loss, first), (none, second) = seen
    assert loss > 0 and none is None
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_validation_set_of_damaged_pictures_has_no_loss(trainer, shelf, write, aligned, tmp_path):
    data, val = write(GOOD), write([record("x", "half.png", "<image>\nWhat?", "No.")], "val.json")
    words = ("--images", shelf, "--steps", 1, "--model", aligned, "--val", val)
    assert trainer.stage(2, data, tmp_path / "out", *words) == 0
    assert metrics(tmp_path / "out", "val_loss") == [(None,)]


def test_when_all_records_are_bad_nothing_is_left_to_train_on(trainer, write, tmp_path, capsys):
    data = write([record("x", "nowhere.png", "<image>?", "No.")])
    status = trainer.stage(2, data, tmp_path / "out", "--skip-bad")
    assert "no record left" in refused(capsys, status, str(data))


@pytest.mark.parametrize(
    ("content", "words"),
    [('{"id": 1}', "JSON array"), ('[{"id": "1", "conv', "not whole JSON"), (None, "cannot be read"), ("[]", "one")],
    ids=["no list", "cut in the middle", "missing", "nothing in it"],
)
def test_a_broken_file_of_records_is_one_line_that_names_it(content, words, trainer, tmp_path, capsys):
    file = tmp_path / "chat.json"
    if content is not None:
        file.write_text(content)
    assert words in refused(capsys, trainer.stage(1, file, tmp_path / "out"), str(file))


def test_wide_and_moving_pictures_are_pictures(trainer, shelf, write, tmp_path):
    data = write([record(name, name, "<image>?", "A ball.") for name in ("wide.png", "moving.gif")])
    assert trainer.stage(2, data, tmp_path / "out", "--images", shelf, "--steps", 1) == 0


def test_pictures_that_break_off_are_skipped_with_a_line_and_counted_at_the_end(
    trainer, shelf, write, aligned, tmp_path, capsys
):
    """The loss is that of the other records; two records about the damaged picture are counted, once each."""
    half = [record(name, "half.png", "<image>\nWhat?", "No.") for name in ("x", "y")]
    words = ("--images", shelf, "--steps", 2, "--batch-size", 4, "--model", aligned, "--val", write(half[:1]))
    assert trainer.stage(2, write([*GOOD, *half]), tmp_path / "out", *words) == 0
    total, count = one_by_one(load(aligned), GOOD, trainer.images)
    assert metrics(tmp_path / "out", "loss")[0] == (pytest.approx(total.item() / count, rel=1e-5),)
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 2 and all(line.startswith("skipped: ") and "half.png" in line for line in lines)
    counts = [line for line in printed.out.splitlines() if line.startswith("skipped")]
    assert counts == [
        "skipped: 2 records, for 1 damaged images",
        "skipped: 1 records, for 1 damaged images",
    ]


# ---------------------------------------------------------------- parts that do not fit


def test_a_tokenizer_that_does_not_fit_the_embedding_is_refused(trainer, captions, tmp_path, capsys):
    other = tmp_path / "vicuna"
    checkpoint.save_language(Llama(LlamaConfig(390, 16, 16, 2, 2, 1)), load_tokenizer(trainer.vicuna), other)
    words = ("--vision", trainer.clip, "--language", other, "--images", trainer.images)
    status = trainer("stage1", "--data", captions, "--out", tmp_path / "out", *words)
    line = refused(capsys, status, str(other))
    assert "400 tokens" in line and "390 rows" in line


def test_folders_that_are_not_what_they_should_be_are_refused(trainer, captions, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(trainer.vicuna, bare)
    (bare / "tokenizer.model").unlink()
    wrong = {
        (trainer.clip, trainer.clip): str(trainer.clip),
        (trainer.vicuna, trainer.vicuna): str(trainer.vicuna),
        (trainer.clip, tmp_path / "nowhere"): "no such folder",
        (trainer.clip, bare): "tokenizer.model",
    }
    for (vision, language), words in wrong.items():
        parts = ("--vision", vision, "--language", language, "--images", trainer.images)
        refused(capsys, trainer("stage1", "--data", captions, "--out", tmp_path / "out", *parts), words)
    parts = ("--data", captions, "--out", tmp_path / "out")
    assert "--vision" in refused(capsys, trainer("stage1", *parts, "--vision", trainer.clip), "--language")
    assert "--model" in refused(capsys, trainer("stage2", *parts))
    assert not (tmp_path / "out").exists()


def test_a_language_folder_killed_between_renames_is_still_found(trainer, captions, tmp_path):
    shutil.copytree(trainer.vicuna, tmp_path / ".vicuna.previous")
    words = ("--vision", trainer.clip, "--language", tmp_path / "vicuna", "--images", trainer.images)
    assert trainer("stage1", "--data", captions, "--out", tmp_path / "out", "--steps", 1, *words) == 0


WRONG = [
    *((name, value) for name in ("--batch-size", "--steps", "--log-every", "--max-length") for value in (0, -1)),
    *((name, value) for name in ("--lr", "--projector-lr", "--clip", "--epochs") for value in (0, -1, "nan", "inf")),
    *((name, -1) for name in ("--rows-at-once", "--save-every", "--val-every", "--weight-decay", "--seed")),
    *((name, value) for name in ("--val-fraction", "--warmup") for value in (-0.1, 1, "nan")),
    ("--seed", 2**32),
    ("--max-length", 2**24 + 1),
    ("--epochs", 2**24 + 1),
    ("--lr", 5000),
    ("--weight-decay", 5000),
    ("--parallel", 0),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda x: str(x))
def test_numbers_that_make_no_sense_are_named_before_anything_is_read(name, value, trainer, tmp_path, capsys):
    status = trainer.stage(2, tmp_path / "no.json", tmp_path / "out", f"{name}={value}")
    assert re.search(rf"{name} is {value}(\.0)?: it must be ", refused(capsys, status))


def test_when_all_records_to_validate_on_are_bad_it_is_said(trainer, write, shelf, aligned, tmp_path, capsys):
    val = write([record("x", "nowhere.png", "<image>?", "No.")], "val.json")
    words = ("--images", shelf, "--model", aligned, "--val", val, "--steps", 1, "--skip-bad")
    assert "no record left" in refused(capsys, trainer.stage(2, write(GOOD), tmp_path / "out", *words), str(val))


def test_two_kinds_of_validation_are_one_too_many(trainer, captions, tmp_path, capsys):
    words = ("--val", captions, "--val-fraction", 0.5)
    refused(capsys, trainer.stage(1, captions, tmp_path / "out", *words), "not both")


@pytest.mark.parametrize("device", ["nonsense", "meta", *([] if torch.cuda.is_available() else ["cuda", "cuda:0"])])
def test_a_device_that_is_not_there_is_one_line(device, trainer, captions, tmp_path, capsys):
    status = trainer.stage(1, captions, tmp_path / "out", "--device", device)
    assert f"device {device}: not to be used here" in refused(capsys, status)


def test_a_gpu_without_bfloat16_is_one_line(trainer, captions, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    status = trainer.stage(1, captions, tmp_path / "out", "--device", "cuda:1")
    refused(capsys, status, "device cuda:1: Tesla T4 lacks bfloat16", "newer one, or cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_bfloat16("cuda:1")


# ---------------------------------------------------------------- in less memory


LIGHT = ("--optimizer", "light", "--steps", 9, "--batch-size", 2, "--save-every", 3, "--lr", 1e-2)


@pytest.mark.parametrize("more", [(), ("--rows-at-once", 1, "--max-length", 100)], ids=["at once", "micro-batches"])
def test_a_light_run_is_kept_in_bfloat16_and_resumed_bit_for_bit(more, trainer, talks, aligned, tmp_path, monkeypatch):
    """What is drawn for its rounding included; so is the norm that the next step is clipped by."""
    report = loop.Run.report

    def interrupted(self, *rest):
        if self.step == 5:
            raise KeyboardInterrupt
        report(self, *rest)

    words = ("--model", aligned, *LIGHT, *more)
    assert trainer.stage(2, talks, tmp_path / "whole", *words) == 0
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "report", interrupted)
        assert trainer.stage(2, talks, tmp_path / "cut", *words) == 130
    assert len(metrics(tmp_path / "cut")) == 3
    assert trainer.stage(2, talks, tmp_path / "cut", *words, "--resume") == 0
    assert same_result(tmp_path / "cut", tmp_path / "whole")
    norms = [norm for (norm,) in metrics(tmp_path / "whole", "grad_norm")]
    assert max(norms) > 1 and len(set(norms)) == 9  # clipping took part
    with safe_open(tmp_path / "whole" / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_a_light_step_is_adamws_but_for_rounding(trainer, talks, aligned, tmp_path):
    """The losses of a few steps without clipping; micro-batches whose last one may be text alone."""
    words = ("--model", aligned, "--steps", 6, "--batch-size", 6, "--lr", 1e-3, "--clip", 1e9, "--warmup", 0)
    for name, more in {"adamw": (), "light": ("--rows-at-once", 1, "--max-length", 150)}.items():
        assert trainer.stage(2, talks, tmp_path / name, *words, "--optimizer", name, *more) == 0
    exact, found = (np.array(metrics(tmp_path / name, "loss", "grad_norm")) for name in ("adamw", "light"))
    assert exact[0, 0] - exact[-1, 0] > 0.1  # it learns
    np.testing.assert_allclose(found[:, 0], exact[:, 0], rtol=5e-3)  # bfloat16 has 8 bits
    np.testing.assert_allclose(found[:, 1], exact[:, 1], rtol=5e-2)


def test_stage_1_takes_the_light_optimizer_too(trainer, captions, tmp_path):
    words = ("--steps", 30, "--batch-size", 2, "--optimizer", "light", "--whiten", "--recompute", "--lr", 1e-2)
    assert trainer.stage(1, captions, tmp_path / "out", *words) == 0
    losses = [loss for (loss,) in metrics(tmp_path / "out", "loss")]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_what_does_not_go_with_the_light_optimizer_is_one_line(trainer, captions, tmp_path, capsys):
    words = ("--optimizer", "light", "--parallel", 2)
    line = refused(capsys, trainer.stage(2, captions, tmp_path / "out", *words), "--optimizer light", "--parallel")
    assert "leave one out" in line


@pytest.mark.parametrize(
    ("optimizer", "device", "expected"),
    [
        ("adamw", "cpu", {"vision": torch.float32, "projector": torch.float32, "language": torch.float32}),
        ("adamw", "cuda:0", {"vision": torch.bfloat16, "projector": torch.float32, "language": torch.bfloat16}),
        ("light", "cpu", {"vision": torch.bfloat16, "projector": torch.bfloat16, "language": torch.bfloat16}),
    ],
)
def test_what_is_only_read_on_cuda_is_kept_in_bfloat16(optimizer, device, expected):
    """Stage 1, which trains the projector alone."""
    assert {part: precision(part, STAGES["stage1"], optimizer, device, lora=False) for part in PARTS} == expected


# ---------------------------------------------------------------- numbers that run away


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["muon", "light"])
def test_a_loss_or_gradient_that_is_no_number_ends_the_run_and_keeps_the_last_checkpoint(
    optimizer, what, trainer, talks, aligned, tmp_path, monkeypatch, capsys
):
    loss, calls = Llava.loss, []

    def runs_away(self, batch):
        calls.append(batch)
        value = loss(self, batch)
        if len(calls) < 5:
            return value
        return value * math.nan if what == "loss" else value + (value - value.detach()).sqrt()  # slope infinite at 0

    monkeypatch.setattr(Llava, "loss", runs_away)
    status = trainer.stage(2, talks, tmp_path / "out", "--model", aligned, *STAGE_2, "--optimizer", optimizer)
    line = refused(capsys, status, f"step 5: the {what}")
    assert "--lr" in line
    assert len(metrics(tmp_path / "out")) == 3
    assert all(tensor.isfinite().all() for tensor in load(tmp_path / "out").state_dict().values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here to train on")
@pytest.mark.parametrize("flex_from", [0, 10_000])
def test_training_on_cuda_follows_the_losses_of_a_cpu(flex_from, trainer, talks, aligned, tmp_path, monkeypatch):
    """bfloat16 products over float32 weights; packed rows in the fused attention, and in PyTorch's own."""
    monkeypatch.setattr(attention, "FLEX_FROM", flex_from)
    words = ("--model", aligned, "--steps", 6, "--batch-size", 2, "--lr", 1e-3, "--save-every", 3)
    for device in ("cpu", "cuda"):
        assert trainer.stage(2, talks, tmp_path / device, *words, "--device", device) == 0
    on_cpu, on_cuda = (metrics(tmp_path / device, "loss") for device in ("cpu", "cuda"))
    assert np.allclose(on_cuda, on_cpu, rtol=2e-2)  # bfloat16 has 8 bits


def test_compiling_the_blocks_changes_no_loss(trainer, talks, aligned, tmp_path, monkeypatch):
    """With a stand-in for the compiler, which hands the program that all blocks share back as it is."""
    programs = []
    monkeypatch.setattr(torch, "compile", lambda program, **_: programs.append(program) or program)
    monkeypatch.setattr(loop, "can_compile", lambda device_type: True)
    words = ("--model", aligned, "--steps", 3, "--batch-size", 2, "--parallel", 2)
    for out, more in (("plain", ()), ("compiled", ("--compile",))):
        assert trainer.stage(2, talks, tmp_path / out, *words, *more) == 0
    assert len(programs) == 1 and metrics(tmp_path / "plain", "loss") == metrics(tmp_path / "compiled", "loss")


def test_recomputing_the_blocks_changes_no_loss(trainer, talks, aligned, cut, undisturbed, tmp_path, monkeypatch):
    """Nor does it when a run that was begun without goes on with it."""
    calls, checkpoint = [], blocks.checkpoint
    monkeypatch.setattr(blocks, "checkpoint", lambda *args, **how: calls.append(how) or checkpoint(*args, **how))
    assert trainer.stage(2, talks, tmp_path / "out", "--model", aligned, *STAGE_2, "--recompute") == 0
    assert same_result(tmp_path / "out", undisturbed)
    assert calls == [{"use_reentrant": False}] * 18  # 2 blocks, 9 steps
    assert trainer.stage(2, talks, cut, "--model", aligned, *STAGE_2, "--recompute", "--resume") == 0
    assert same_result(cut, undisturbed)


def test_training_on_a_cpu_computes_in_float32(trainer, talks, aligned, tmp_path, monkeypatch):
    loss, seen = Llava.loss, []

    def spy(self, batch):
        value = loss(self, batch)
        seen.extend([value.dtype, torch.is_autocast_enabled("cpu"), *{p.dtype for p in self.parameters()}])
        return value

    monkeypatch.setattr(Llava, "loss", spy)
    assert trainer.stage(2, talks, tmp_path / "out", "--model", aligned, "--steps", 1) == 0
    assert seen == [torch.float32, False, torch.float32]


def test_workers_share_the_cores_and_whoever_waits_for_them_keeps_all():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with share_cores(2) as pool:
            assert list(pool.map(lambda _: torch.get_num_threads(), range(4))) == [2] * 4
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
