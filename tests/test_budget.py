"""--dry-run: the formulas against autograd's own list, against what runs then take, and against sums by hand for 7B."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanollava import checkpoint
from nanollava import folder as files
from nanollava.attention import Mask, attention
from nanollava.llama import Block, Llama, LlamaConfig, rotary_angles
from nanollava.llava import Batch, LlavaConfig
from nanollava.tokenizer import Tokenizer
from nanollava.train import budget, lora
from nanollava.train.advice import advice
from nanollava.train.budget import GB, How, Work, estimate, full_rows, outline
from nanollava.train.stages import STAGES
from nanollava.vit import VisionConfig, VisionTransformer

CLIP = VisionConfig(336, 14, 1024, 4096, 24, 16)
LLAVA_7B = LlavaConfig(CLIP, LlamaConfig(), "mlp2x_gelu")
ON_CUDA = How(on_cuda=True)
ROW = Work(1, 2048, 1472, 3)
WORDS = ["a", "big", "red", "star", "and", "a", "small", "blue", "ball", "near", "the", "green", "square"]


def talk(i: int, words: int) -> dict:
    answer = " ".join(WORDS[(i * 7 + j) % 12] for j in range(words))
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]
    return {"id": str(i), "image": f"{'abcd'[i % 4]}.png", "conversations": turns}


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "talks.json"
    file.write_text(json.dumps([talk(i, 12) for i in range(12)]))
    return file


# ---------------------------------------------------------------- against autograd


@pytest.mark.parametrize("rows", ["one document", "documents", "branches"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("how", ["full", "lora", "frozen"])
def test_a_block_keeps_what_autograd_says_it_keeps(how, dropout, rows):
    """Every storage that the backward pass of one block will need, weights, angles and the bool mask apart. Rows of
    four documents are long enough to be taken apart."""
    B, T, c = 2, 96 if rows == "one document" else 256, LlamaConfig(100, 64, 176, 1, 4, 2)
    language = Llama(c)
    if how == "lora":
        holder = torch.nn.Module()
        holder.language, holder.projector = language, torch.nn.Identity()
        lora.adapt(holder, 4, 8, dropout)
        holder.train()
    language.requires_grad_(how == "full") if how != "lora" else None
    documents = (torch.arange(T) // 64 * (rows != "one document")).expand(B, T)
    branches = (torch.arange(T) % 64 // 40 * (rows == "branches")).expand(B, T)
    masked = budget.masked_keys(documents, branches)
    assert masked == {"one document": None, "documents": 0, "branches": 64}[rows]
    attend = attention(Mask(documents=documents, branches=branches), B, T, T, torch.device("cpu"))
    angles = rotary_angles(torch.arange(T).expand(B, T), c, torch.float32)
    apart = [*language.parameters(), *angles]
    known, kept = {t.untyped_storage().data_ptr() for t in apart}, {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no place is used twice
        return tensor

    block: Block = language.layers[0]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = block(torch.randn(B, T, c.hidden_size, requires_grad=True), angles, attend, None)
    plan = How(on_cuda=False, lora=4 if how == "lora" else None, dropout=dropout)
    expected = B * T * budget.block_bytes(c, plan, T, how == "full", masked)
    assert result.requires_grad and sum(size for size, _ in kept.values()) == expected


# ---------------------------------------------------------------- against sums by hand


def test_parameters_and_bytes_of_7b():
    """PROTOCOL's counts: 6,738,415,616 of the decoder, 303,507,456 of the tower; the projector has two layers."""
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    full = estimate(outline(LLAVA_7B, STAGES["stage2"], ON_CUDA), ON_CUDA, ROW)
    trained = 6_738_415_616 + projector
    assert full.weights == 4 * trained + 2 * 303_507_456  # the tower is only read
    assert (full.gradients, full.states) == (4 * trained, 8 * trained)
    short = estimate(outline(LLAVA_7B, STAGES["stage2"], ON_CUDA), ON_CUDA, Work(1, 64, 8, 0))
    assert short.peak == full.weights + (8 + 4 + 4) * trained  # states, gradients, and AdamW's roots of all at once
    with_lora = replace(ON_CUDA, lora=128, dropout=0.05)
    small = estimate(outline(LLAVA_7B, STAGES["stage2"], with_lora), with_lora, ROW)
    adapters = 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert small.weights == 2 * (6_738_415_616 + 303_507_456) + 4 * (adapters + projector)
    assert (small.gradients, small.states) == (4 * (adapters + projector), 8 * (adapters + projector))
    light = replace(ON_CUDA, optimizer="light", recompute=True)
    least = estimate(outline(LLAVA_7B, STAGES["stage2"], light), light, ROW)
    assert (least.weights, least.states) == (2 * (trained + 303_507_456), 4 * trained)
    assert least.gradients == 2 * max(32000 * 4096, 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    several = estimate(outline(LLAVA_7B, STAGES["stage2"], light), light, replace(ROW, parts=4))
    assert several.gradients == 2 * trained  # those of the first three wait for the last
    assert several.peak - least.peak == 2 * trained
    first = estimate(outline(LLAVA_7B, STAGES["stage1"], ON_CUDA), ON_CUDA, ROW)
    assert (first.gradients, first.states) == (4 * projector, 8 * projector)
    assert first.weights == 2 * (6_738_415_616 + 303_507_456) + 4 * projector  # stage 1 only reads the decoder too


def test_recomputing_keeps_the_inputs_of_the_blocks():
    kept = replace(ON_CUDA, lora=128)
    less = replace(kept, recompute=True)
    every = [estimate(outline(LLAVA_7B, STAGES["stage2"], how), how, ROW).activations for how in (kept, less)]
    block = 2048 * budget.block_bytes(LLAVA_7B.language, kept, 2048, False)
    assert every[0] - every[1] == 31 * block - 32 * 2048 * 2 * 4096


def test_what_the_issue_promises_fits():
    """Full stage 2 of 7B on 80 GB, LoRA on 24 GB, a 1.1B decoder in full on 24 GB; and full AdamW nowhere."""
    stage = STAGES["stage2"]
    full, rows = How(on_cuda=True, optimizer="light", recompute=True), Work(4, 2048, 4 * 1472, 12)
    assert estimate(outline(LLAVA_7B, stage, full), full, rows).peak < 75 * GB
    adapted = How(on_cuda=True, lora=128, dropout=0.05, recompute=True)
    assert advice(LLAVA_7B, stage, adapted, ROW, 24 * GB).startswith("fits")
    small = replace(LLAVA_7B, language=LlamaConfig(32000, 2048, 5632, 22, 32, 4))
    light = replace(full, optimizer="light")
    assert advice(small, stage, light, ROW, 24 * GB).startswith("fits")
    assert advice(LLAVA_7B, stage, ON_CUDA, ROW, 80 * GB).startswith("too small")


def test_what_does_not_fit_is_told_what_would_help_and_by_how_much():
    stage, rows = STAGES["stage2"], Work(4, 2048, 4 * 1472, 12)
    said = advice(LLAVA_7B, stage, ON_CUDA, rows, 24 * GB)
    found = re.match(r"too small for ([\d.]+) GB; (.*): fits, with ([\d.]+) GB", said)
    saved = [float(x) for x in re.findall(r"saves ([\d.]+)", found[2])]
    assert float(found[1]) - sum(saved) == pytest.approx(float(found[3]), abs=0.3) and "--lora 128 saves" in found[2]
    assert "still" in advice(LLAVA_7B, stage, ON_CUDA, rows, 8 * GB)
    assert "--lora" not in advice(LLAVA_7B, STAGES["stage1"], ON_CUDA, rows, 8 * GB)
    assert "--optimizer light saves" in advice(LLAVA_7B, stage, ON_CUDA, rows, 80 * GB)


def test_full_rows_hold_images_of_one_record_each():
    assert full_rows(LLAVA_7B, 2, 6) == Work(2, 2048, 2 * (2048 - 3 * 576), 6, masked=0)
    assert full_rows(LLAVA_7B, 2, 32).parts == 6  # five of them full
    one = replace(LLAVA_7B, max_length=640)  # a row of one document has one mask
    assert full_rows(one, 2, 2) == Work(2, 640, 2 * (640 - 576), 2, masked=None)


def batch_of(documents: int, branches: int, T: int = 2048) -> Batch:
    """Two rows of so many documents, each with a shared beginning and so many branches of equal length."""
    positions, each = torch.arange(T), T // documents
    branch = positions % each // (each // (1 + branches)) if branches else torch.zeros_like(positions)
    columns = {"token_ids": positions, "labels": positions, "patches": positions, "positions": positions}
    columns |= {"documents": positions // each, "branches": branch}
    return Batch(**{name: column.expand(2, T) for name, column in columns.items()}, pixels=None)


def test_on_a_cpu_documents_of_long_rows_have_masks_of_their_own_or_none():
    """SmolLM's 135m at 2,048 positions, by hand: 4 bytes for each pair of positions, in 30 layers, or for none; where
    documents are taken one by one, their results are there twice. On CUDA it makes no difference."""
    one, apart, branched = (Work.largest([batch_of(*shape)], 1) for shape in ((1, 0), (8, 0), (8, 1)))
    assert (one.masked, apart.masked, branched.masked) == (None, 0, 2048 // 8)
    config = LlavaConfig(VisionConfig(112, 14), LlamaConfig(49152, 576, 1536, 30, 9, 3))
    stage, cpu = STAGES["stage2"], How(on_cuda=False)
    whole, alone, between = (
        estimate(outline(config, stage, cpu), cpu, work).activations for work in (one, apart, branched)
    )
    assert whole - alone == 30 * 2 * 2048 * (4 * 2048 - 4 * 576)
    assert between - alone == 30 * 2 * 2048 * 4 * 256
    assert 1.1 < whole / alone < 1.2
    cards = {estimate(outline(config, stage, ON_CUDA), ON_CUDA, work).activations for work in (one, apart, branched)}
    assert len(cards) == 1


# ---------------------------------------------------------------- as it is typed


def test_nothing_is_loaded_without_data(trainer, monkeypatch, capsys):
    monkeypatch.setattr(files, "tensors", lambda file: pytest.fail(f"{file} was read"))
    words = ("--vision", trainer.clip, "--language", trainer.vicuna, "--device", "cpu", "--dry-run")
    for stage, more in (("stage1", ()), ("stage2", ()), ("stage2", ("--lora", 4))):
        assert trainer(stage, *words, *more, "--batch-size", 2) == 0
        out = capsys.readouterr().out
        for line in ("weights", "optimizer states", "activations of 2 rows of 2,048 positions", " 80 GB card: fits"):
            assert line in out
        assert "probe" not in out


def test_with_data_ten_steps_are_made_and_nothing_is_saved(trainer, talks, tmp_path, capsys):
    for more in ((), ("--lora", 4), ("--rows-at-once", 1)):
        words = ("--steps", 7200, "--batch-size", 4, "--dry-run", *more)
        assert trainer.stage(2, talks, tmp_path / "out", *words) == 0
        out = capsys.readouterr().out
        pattern = r"of 10 steps: ([\d.]+) s a step, so 7,200 steps take about ([\d.]+) hours"
        seconds, hours = re.search(pattern, out).groups()
        assert float(hours) == pytest.approx(2 * float(seconds), abs=0.02)
        small = "libraries decide in so small a run"
        assert re.search(rf"peak of memory: [\d.]+ GB measured, [\d.]+ GB estimated; {small}\n", out)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_that_reads_no_picture_has_no_hours(trainer, tmp_path, capsys):
    (tmp_path / "half.png").write_bytes((trainer.images / "a.png").read_bytes()[:900])
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A star."}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "x", "image": "half.png", "conversations": turns}]))
    words = ("--steps", 3, "--batch-size", 1, "--dry-run", "--images", tmp_path)
    assert trainer.stage(2, tmp_path / "data.json", tmp_path / "out", *words) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("error: nothing was learnt") and "hours" not in printed.out


def test_bad_input_of_a_dry_run_is_one_line(trainer, talks, tmp_path, capsys):
    (tmp_path / "vicuna").mkdir()
    for word in ("config.json", "tokenizer.model"):
        (tmp_path / "vicuna" / word).write_bytes((trainer.vicuna / word).read_bytes())
    start = ("--vision", trainer.clip, "--language")
    for words, told in (
        ((*start, trainer.vicuna, "--lora", 17), "--lora 17"),
        ((*start, tmp_path / "nowhere"), "nowhere"),
        ((*start, tmp_path / "vicuna"), "no weights in it"),
    ):
        assert trainer("stage2", *words, "--device", "cpu", "--dry-run") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and told in error and error.count("\n") == 1


@pytest.mark.parametrize(("given", "missing"), [("--data", "--out"), ("--out", "--data")])
def test_a_real_run_needs_data_and_a_folder(given, missing, trainer, talks, tmp_path, capsys):
    assert trainer("stage2", given, talks if given == "--data" else tmp_path / "out") == 2
    assert f"give {missing}" in capsys.readouterr().err


def test_on_the_device_meta_a_folder_is_checked_and_not_read(trainer, tmp_path):
    language = checkpoint.load_language(trainer.vicuna, device="meta")
    assert all(p.is_meta for p in language.parameters()) and language.config.hidden_size == 32
    assert all(p.is_meta for p in checkpoint.load_vision(trainer.clip, device="meta").parameters())


# ---------------------------------------------------------------- against what a run takes

PROBE = """
import sys
import torch
import train
from nanollava.train import loop
torch.set_num_threads(2)
if "mapped" in sys.argv[1]:
    loop.keep_freed_memory = lambda: None
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def hundred_million(trainer, tiny_tokenizer_file, tmp_path_factory) -> Path:
    """A decoder of 101 million parameters and answers that fill rows of 640 positions."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    llama = Llama(LlamaConfig(400, 768, 2048, 16, 12, 4))
    checkpoint.save_language(llama, Tokenizer(tiny_tokenizer_file), folder / "llm")
    checkpoint.save_vision(VisionTransformer(VisionConfig(112, 14, 128, 512, 3, 2)), folder / "clip")
    (folder / "talks.json").write_text(json.dumps([talk(i, 60) for i in range(12)]))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="the C library's heap is another one")
@pytest.mark.parametrize(
    ("malloc", "words", "within"),
    [
        ("mapped", ("stage2",), 3),  # every tensor from the system and back: what tensors take, and nothing else
        ("mapped", ("stage2", "--lora", "32"), 3),
        ("as it is", ("stage2",), 10),
    ],
    ids=["tensors of stage 2", "tensors of lora", "the process in stage 2"],
)
def test_a_run_takes_what_was_estimated(malloc, words, within, trainer, hundred_million):
    settings = ("--batch-size", "2", "--steps", "2", "--max-length", "640", "--device", "cpu", "--dry-run")
    places = {"--vision": "clip", "--language": "llm", "--data": "talks.json"}
    found = [str(x) for name, place in places.items() for x in (name, hundred_million / place)]
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if malloc == "mapped" else {})
    command = [sys.executable, "-c", PROBE, malloc, *words, *found, "--images", str(trainer.images), *settings]
    root = Path(budget.__file__).parents[2]
    run = subprocess.run(command, capture_output=True, text=True, env=environment | {"PYTHONPATH": str(root)}, cwd=root)
    assert run.returncode == 0, run.stderr
    measured, process = map(float, re.search(r"([\d.]+) GB measured, ([\d.]+) GB estimated", run.stdout).groups())
    live = float(re.search(r"at the same time, at most +([\d.]+) GB", run.stdout)[1])
    assert measured > 0.5
    assert (live if malloc == "mapped" else process) == pytest.approx(measured, rel=within / 100)
