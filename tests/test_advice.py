"""When memory runs out in a step: one line with what to lower and what it saves, nothing lost, and a run that goes on
as advised. Figures are those of the budget, which test_budget.py holds to what runs take."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanollava import checkpoint
from nanollava.llama import LlamaConfig
from nanollava.llava import Llava, LlavaConfig
from nanollava.train import lora
from nanollava.train.advice import advice, shortage
from nanollava.train.budget import GB, How, Work, estimate, outline
from nanollava.train.stages import STAGES
from nanollava.vit import VisionConfig

LLAVA_7B = LlavaConfig(VisionConfig(336, 14, 1024, 4096, 24, 16), LlamaConfig(), "mlp2x_gelu")
STAGE_2, ROWS, ROW = STAGES["stage2"], Work(4, 2048, 4 * 1472, 12), Work(1, 2048, 1472, 3)
ADAPTED = How(on_cuda=True, lora=128, dropout=0.05)
FULL = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory: you tried"
    ),
    "linux": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 1073741824 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "python": MemoryError,
}
WORDS = ("--steps", 6, "--batch-size", 3, "--save-every", 2, "--max-length", 150, "--lr", 1e-2, "--val-fraction", 0.2)


def talk(name: str, image: str | None, question: str, answer: str) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, **({"image": image} if image else {}), "conversations": turns}


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "talks.json"
    words = [talk(f"r{x}", f"{x}.png", "<image>\nWhat is this?", f"A {x} star.") for x in "abcd"]
    file.write_text(json.dumps([*words, talk("t1", None, "What is a square?", "It has four sides.")]))
    return file


def metrics(folder: Path) -> list[dict]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: entry[name] for name in ("step", "loss", "grad_norm")} for entry in entries]


def fails_at(monkeypatch, step: int, error: Exception, method: str = "loss") -> None:
    """Memory runs out in the first forward pass of that step of one micro-batch a step."""
    whole, calls = getattr(Llava, method), []

    def full(self, batch):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == step and calls[-1]:
            raise error
        return whole(self, batch)

    monkeypatch.setattr(Llava, method, full)


def line_of(capsys, status: int) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


# ---------------------------------------------------------------- as it is typed


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
@pytest.mark.parametrize("more", [(), ("--lora", 4, "--lora-dropout", 0), ("--optimizer", "light")], ids=str)
def test_a_step_that_does_not_fit_is_one_line_and_the_run_goes_on_as_it_advises(
    error, more, trainer, talks, tmp_path, monkeypatch, capsys
):
    words = (*WORDS, *more)
    assert trainer.stage(2, talks, tmp_path / "whole", *words) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        fails_at(patch, 4, error())
        status = trainer.stage(2, talks, tmp_path / "out", *words)
    line = line_of(capsys, status)
    pattern = (
        r"error: step 4 does not fit into memory, with 3 rows of 128 positions at once: "
        r"((?:, )?--[a-z1 -]+ saves [\d.]+ MB)+: "
        r"give (it|them) with --resume to go on from step 2(; in a new run --optimizer light saves [\d.]+ MB)?"
    )
    found = re.fullmatch(pattern, line)
    assert found and bool(found[3]) == (more == ())
    advised = re.findall(r"(--[a-z1 -]+) saves", line.partition(": give")[0])
    assert advised == (["--recompute", "--rows-at-once 1"] if "light" in more else ["--rows-at-once 1", "--recompute"])
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")[:2]
    assert trainer.stage(2, talks, tmp_path / "out", *words, *" ".join(advised).split(), "--resume") == 0
    near = 5e-3 if "light" in more else 1e-5  # bfloat16 gradients, added up
    for mine, theirs in zip(metrics(tmp_path / "out"), metrics(tmp_path / "whole"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=near)


def test_before_the_first_checkpoint_it_starts_again(trainer, talks, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        fails_at(patch, 2, FULL["cuda"]())
        status = trainer.stage(2, talks, tmp_path / "out", *WORDS)
    assert "--recompute saves" in (line := line_of(capsys, status)) and "give them and start again" in line
    assert trainer.stage(2, talks, tmp_path / "out", *WORDS, "--rows-at-once", 1, "--recompute") == 0


def test_side_by_side_and_with_all_that_helps_already_given(trainer, talks, tmp_path, monkeypatch, capsys):
    for more, told, untold in (
        (("--parallel", 2), ("2 rows of", "--parallel 1 saves"), "--max-length"),
        (("--rows-at-once", 1, "--recompute"), ("1 row of", "a --max-length below 150, or more GPUs"), "--resume"),
    ):
        with monkeypatch.context() as patch:
            fails_at(patch, 1, FULL["cpu"]())
            line = line_of(capsys, trainer.stage(2, talks, tmp_path / "out", *WORDS, *more))
        assert all(words in line for words in told) and untold not in line


def test_outside_of_a_step_the_dry_run_is_named(trainer, talks, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise FULL["cuda"]()

    monkeypatch.setattr(checkpoint, "fill", full)
    assert "--dry-run tells what" in line_of(capsys, trainer.stage(2, talks, tmp_path / "out", *WORDS))


def test_a_dry_run_that_does_not_fit_is_not_sent_to_the_dry_run(trainer, talks, tmp_path, monkeypatch, capsys):
    fails_at(monkeypatch, 1, FULL["linux"]())
    line = line_of(capsys, trainer.stage(2, talks, tmp_path / "out", *WORDS, "--dry-run"))
    assert "step 1 does not fit into memory" in line and "--rows-at-once 1 saves" in line and "--dry-run" not in line

    def full(*_, **__):
        raise FULL["linux"]()

    monkeypatch.setattr(checkpoint, "fill", full)
    line = line_of(capsys, trainer.stage(2, talks, tmp_path / "out", *WORDS, "--dry-run"))
    assert "out of memory" in line and "--dry-run" not in line


def test_a_mistake_of_ours_is_no_lack_of_memory(trainer, talks, tmp_path, monkeypatch):
    fails_at(monkeypatch, 1, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        trainer.stage(2, talks, tmp_path / "out", *WORDS)


# ---------------------------------------------------------------- the figures


def peak(how: How, work: Work) -> int:
    return estimate(outline(LLAVA_7B, STAGE_2, how), how, work).peak


def test_each_saving_is_what_the_budget_falls_by():
    line = shortage(LLAVA_7B, STAGE_2, ADAPTED, ROWS, 5, 4)
    first, second = (float(x) for x in re.findall(r"saves ([\d.]+) GB", line))
    one = replace(ROW, parts=4)
    assert first == pytest.approx((peak(ADAPTED, ROWS) - peak(ADAPTED, one)) / GB, abs=0.06)
    less = replace(ADAPTED, recompute=True)
    assert second == pytest.approx((peak(ADAPTED, one) - peak(less, one)) / GB, abs=0.06)
    assert first > 30 and second > 10


def test_what_is_refused_or_impossible_is_not_advised():
    """The light optimizer under adapters, adapters in stage 1, or wider than the smallest matrix."""
    assert "light" not in shortage(LLAVA_7B, STAGE_2, ADAPTED, ROWS, 5, 4)
    assert "light" not in advice(LLAVA_7B, STAGE_2, ADAPTED, ROWS, 8 * GB)
    first = shortage(LLAVA_7B, STAGES["stage1"], How(on_cuda=True), ROWS, 5, 4)
    small = replace(LLAVA_7B, language=LlamaConfig(32000, 1024, 2048, 2, 16, 1))  # keys are 64 wide
    assert "--lora" not in first + shortage(small, STAGE_2, How(on_cuda=True), ROWS, 5, 4)
    small.language.num_key_value_heads = 2
    assert f"--lora {lora.RANK} saves" in shortage(small, STAGE_2, How(on_cuda=True), ROWS, 5, 4)


def test_several_processes_have_a_share_each_of_what_another_optimizer_saves():
    line = shortage(LLAVA_7B, STAGE_2, How(on_cuda=True, recompute=True, processes=4), ROW, 5, 4)
    alone = shortage(LLAVA_7B, STAGE_2, How(on_cuda=True, recompute=True), ROW, 5, 4)
    of_four, of_one = (float(re.search(r"--optimizer light saves ([\d.]+) GB", x)[1]) for x in (line, alone))
    assert of_four == pytest.approx(of_one / 4, rel=0.05)
