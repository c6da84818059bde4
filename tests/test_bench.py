"""The benchmark counts what it says it counts, compares the same work only, and tells everything it measured. No time
is asserted."""

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nanollava
from nanollava.attention import Mask
from nanollava.bench import __main__ as command
from nanollava.bench import (
    ladder,
    limits,
    load,
    machine,
    measure,
    models,
    operations,
    ours,
    reference,
    report,
    training,
)
from nanollava.bench.batches import Drawn, grouped, make_examples, padded, spliced
from nanollava.bench.limits import Limits
from nanollava.bench.ours import Done
from nanollava.bench.rows import Row, alternate, difference, in_turn, settle
from nanollava.conversation import IGNORE
from nanollava.error import Error
from nanollava.llama import Cache, Llama, LlamaConfig
from nanollava.llava import Llava, LlavaConfig
from nanollava.vit import VisionConfig

CPU = torch.device("cpu")
TINY = LlavaConfig(VisionConfig(16, 8, 16, 40, 3, 2), LlamaConfig(64, 24, 36, 2, 4, 2, head_dim=6), "mlp2x_gelu")
TIED = replace(TINY, language=replace(TINY.language, tie_word_embeddings=True))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark on architectures that take no time."""
    monkeypatch.setattr(models, "MODELS", {"miniature": TINY, "135m": TIED, "1.1b": TINY, "7b": TINY})
    small = measure.Effort(2, 5, 3, 2, 1, 2)
    monkeypatch.setattr(measure, "QUICK", {"miniature": small, "135m": replace(small, warm=False, compiled=True)})
    monkeypatch.setattr(measure, "FULL", dict.fromkeys(models.MODELS, small))
    monkeypatch.setattr(command, "measure_limits", lambda device, dtype: Limits(1.0, 2.0, 3.0))


# ---------------------------------------------------------------- what is counted


def counted(work) -> int:
    with ladder.plain_attention(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", [TINY, TIED], ids=["tiny", "tied"])
def test_operations_of_decoder_and_head_are_those_that_pytorch_counts(config):
    """The plain attention computes all pairs, those that the mask leaves out too."""
    language, x = Llama(config.language), torch.randn(1, 11, 24)
    assert counted(lambda: language.hidden(x)) == operations.decoder_operations(config.language, 11, 11 * 11)
    assert counted(lambda: language.lm_head(x)) == operations.head_operations(config.language, 11)


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_operations_of_the_tower_are_those_that_pytorch_counts(layer):
    config = replace(TINY, select_layer=layer)
    model, pixels = Llava(config), torch.randn(2, 3, 16, 16)
    expected = 2 * operations.tower_operations(config.vision, operations.tower_blocks(config))
    assert counted(lambda: model.vision(pixels, layer)) == expected
    assert operations.tower_blocks(config) == 3 + layer + 1


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_operations_of_a_training_step_are_those_that_pytorch_counts(stage, projector, monkeypatch):
    """Each record in a row of its own, filled up to a multiple of 64 positions, of which plain attention computes all
    pairs: so the formula is given rows of that length, and all pairs."""
    config = replace(TINY, projector_type=projector)
    data = Drawn(make_examples(config, stage, 3), config)
    run, batch = ours.trainer(Llava(config), stage, data, 3), ladder.one_document_a_row(data)
    targets, (rows, length) = int((batch.labels[:, 1:] != IGNORE).sum()), batch.labels.shape
    monkeypatch.setattr(operations, "causal_pairs", lambda lengths: sum(n * n for n in lengths))
    expected = operations.step_operations(config, [length] * rows, targets, 3, run.stage.trained)
    if stage == "stage2":  # the counter does not know addmm_, by which loss.py adds up the head's gradient
        expected -= operations.head_operations(config.language, targets)
    assert counted(lambda: run.update([batch])) == expected


def test_causal_pairs_are_those_of_the_mask():
    documents = torch.tensor([[0] * 5 + [1] * 3 + [2]])
    assert operations.causal_pairs([5, 3, 1]) == Mask(documents=documents).dense(1, 9, 9, CPU).sum()


@pytest.mark.parametrize("config", [TINY, TIED], ids=["tiny", "tied"])
def test_bytes_of_decoding_are_those_of_the_tensors(config):
    language = Llama(config.language).to(torch.bfloat16)
    read = [p for name, p in language.named_parameters() if config is TIED or name != "embed_tokens.weight"]
    assert operations.weight_bytes(language) == sum(p.numel() * 2 for p in read)
    matrices = 24 * 24 + 24 * 12 + 24 * 12 + 24 * 24 + 3 * 24 * 36  # q, k, v, o, and the three of SwiGLU
    assert operations.weight_bytes(language) == 2 * (2 * (matrices + 2 * 24) + 24 + 64 * 24)
    assert operations.block_matrices(config.language) == 2 * matrices
    cache = Cache(config.language, 1, 100, CPU, torch.bfloat16)
    assert operations.cache_bytes(config.language, 100, 2) == sum(kept.nbytes for kept in cache.keys + cache.values)


def test_the_architectures_are_those_that_they_are_named_after():
    size = lambda name: sum(p.numel() for p in models.without_numbers(models.MODELS[name]).language.parameters())  # noqa: E731
    assert size("135m") == 134_515_008 and size("1.1b") == 1_100_048_384 and size("7b") == 6_738_415_616
    bundled = nanollava.load(Path(__file__).parent.parent / "weights/miniature").config
    mini = models.MODELS["miniature"]
    assert mini.vision == bundled.vision
    positions = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    assert mini.language == replace(bundled.language, **positions)
    assert {c.vision.num_patches for n, c in models.MODELS.items() if n != "miniature"} == {576}


# ---------------------------------------------------------------- what a row says


def test_percentages_and_ratios_worked_by_hand():
    row = Row("m", "w", "tokens/s", [10.0, 20.0, 40.0], [5.0, 5.0, 40.0], [1e9, 2e9, 3e9], "vector", 80.0)
    # 10, 40 and 120 GB a second of 80; ratios 2, 4 and 1
    assert row.rate == 20 and row.reached == 50 and row.ratios == [2, 4, 1] and row.ratio == 2
    line = report.line(row)
    assert line == "m  w  20.0 tokens/s  50% of matrix-vector  5.00  2.00x (1.00 to 4.00)"
    assert row.record()["ratio"] == 2 and row.record()["ours"] == [10, 20, 40]
    empty = Row("m", "w", note="skipped: no room")
    assert (empty.rate, empty.ratio, empty.reached) == (None, None, None)
    assert report.table([empty]).splitlines()[-1] == "| m | w | - | - | - | - | skipped: no room |"


def scripted(rates: list[float], result: float, order: list[str], name: str) -> ours.Work:
    def work(repetition: int) -> Done:
        order.append(f"{name}{repetition}")
        return Done(rates[repetition], torch.tensor([result, 1.0]))

    return work


def test_both_take_turns_and_the_first_of_each_does_not_count():
    order = []
    done = in_turn([scripted([1, 2], 0, order, "a"), scripted([3, 4], 0, order, "b")], 2)
    assert [[d.rate for d in some] for some in done] == [[1, 2], [3, 4]]
    assert order == ["b0", "a0", "a0", "b0", "b1", "a1"]
    order.clear()
    in_turn([scripted([1], 0, order, "a")], 1, warm=False)
    assert order == ["a0"]


def test_different_work_gets_no_ratio():
    for apart, agree in ((0.0, True), (0.9e-3, True), (1.1e-3, False), (math.nan, False)):
        works = scripted([6], 0.5, [], "a"), scripted([3], 0.5 + apart, [], "b")
        row = alternate(Row("m", "w"), *works, 1, 1e-3)
        assert row.agree is agree and row.ratio == (2 if agree else None)
        assert ("NOT THE SAME WORK" in report.line(row)) is not agree
    assert difference(torch.zeros(2), torch.zeros(3)) == math.inf
    assert difference(torch.tensor([math.nan, 1]), torch.ones(2)) == math.inf
    assert settle(Row("m", "w"), [Done(6, torch.zeros(1))], [Done(3, torch.ones(1))], None).ratio == 2


# ---------------------------------------------------------------- what is compared


def test_packed_and_padded_batches_hold_the_same_records():
    examples = make_examples(TINY, "stage2", 6)
    data = Drawn(examples, TINY)
    (packed,), other = data.batches(range(6)), padded(data, range(6), 63)
    words = lambda ids: sorted(ids[(ids >= 3) & (ids < 63)].tolist())  # noqa: E731
    assert words(packed.token_ids[packed.documents >= 0]) == words(other["input_ids"][other["attention_mask"] > 0])
    assert (other["input_ids"] == 63).sum() == 6 * 4 == (packed.patches >= 0).sum()
    kept = lambda labels: sorted(labels[labels != IGNORE].tolist())  # noqa: E731
    assert kept(packed.labels) == kept(other["labels"])
    assert sorted(p.sum().item() for p in packed.pixels) == sorted(p.sum().item() for p in other["pixel_values"])
    assert (packed.documents >= 0).sum() == other["attention_mask"].sum()
    assert sorted(n for batch in grouped(data, range(2, 6), 2) for n in batch) == [2, 3, 4, 5]


def test_examples_are_records_of_these_lengths_in_each_stages_template():
    from nanollava.bench.lengths import records

    for stage in ("stage1", "stage2"):
        for example, turns in zip(make_examples(TINY, stage, 20), records(20, 0), strict=True):
            answers = turns if stage == "stage2" else turns[:1]
            assert (example.labels != IGNORE).sum() == sum(a + 1 for _, a in answers)
            asked = 36 + sum(8 + q for q, _ in turns) if stage == "stage2" else 2
            assert len(example.token_ids) == asked + sum(a + 1 for _, a in answers)
    longest = replace(TINY, max_length=50)
    assert {len(spliced(e, longest).labels) for e in make_examples(longest, "stage2", 20)} == {50}


def test_no_answer_of_random_weights_ends_early(tmp_path):
    models.write_random(TIED, tmp_path / "m", torch.float32)
    model = nanollava.load(tmp_path / "m")
    done = ours.decode(model, models.prompt(TIED), models.picture(TIED), 40)(0)
    assert len(done.result) == 40 and done.rate > 0
    assert model.config.language.vocab_size == 64 and not model.language.embed_tokens.weight[[2, 63]].any()


def test_random_weights_are_written_in_shards(tmp_path, monkeypatch):
    whole = models.without_numbers(TINY).state_dict()
    models.write_random(TINY, tmp_path / "one", torch.bfloat16)
    monkeypatch.setattr(models, "SHARD", 8000)
    models.write_random(TINY, tmp_path / "some", torch.bfloat16)
    assert len(list((tmp_path / "some").glob("*.safetensors"))) > 2
    one, some = nanollava.load(tmp_path / "one").state_dict(), nanollava.load(tmp_path / "some").state_dict()
    assert one.keys() == whole.keys() and all(torch.equal(one[name], some[name]) for name in whole)


# ---------------------------------------------------------------- the whole


def test_quick_measures_every_row_and_writes_everything(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reference, "installed", lambda: False)
    file = tmp_path / "all.json"
    assert command.main(["--quick", "--device", "cpu", "--out", str(file)]) == 0
    content, printed = json.loads(file.read_text()), capsys.readouterr()
    works = ["load", "tower", "prefill", "decode", "stage 1 step", "stage 2 step"]
    rows = [("miniature", work) for work in works]
    works[4:4] = ["decode, compiled", "decode, int8"]
    assert [(row["model"], row["work"]) for row in content["rows"]] == rows + [("135m", work) for work in works]
    for row in content["rows"]:
        assert row["ours"] and row["rate"] > 0 and row["reached"] > 0 and not row["theirs"] and row["ratio"] is None
        assert f"| {row['model']} | {row['work']} |" in printed.out and not row["note"].startswith("skipped")
        assert len(row["amounts"]) == len(row["ours"])
    assert content["complete"] and content["machine"]["torch"] == torch.__version__
    assert content["machine"]["processor"] == machine.processor() and content["machine"]["threads"]
    assert content["limits"] == {"copy GB/s": 1, "vector GB/s": 2, "product GFLOP/s": 3}
    assert [t["where"] for t in content["targets"]] == ["CPU"] * 6
    assert "miniature: tower" in printed.err and "tower" not in printed.out.partition("|")[0]


def test_limits_are_numbers():
    assert limits.copy_rate(CPU, 1000, 2) > 0 and limits.product_rate(CPU, torch.float32, 16, 2) > 0
    assert limits.vector_rate(CPU, torch.float32, 16, 3, 2) > 0


def test_the_ladder_climbs_with_the_same_results(tiny, monkeypatch, capsys):
    monkeypatch.setattr(ladder, "TOKENS", 6)
    monkeypatch.setattr(ladder, "REPETITIONS", 1)
    assert command.main(["--ladder", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 + 4 + 5
    assert [line.split(" | ")[3] for line in lines if line.endswith(" 1.00x |")].__len__() >= 3


def test_a_ladder_whose_steps_compute_different_things_is_refused():
    steps = [("plain", lambda: (1.0, torch.ones(2))), ("wrong", lambda: (9.0, torch.tensor([1.0, 1.1])))]
    with pytest.raises(Error, match="work, wrong: computes something else"):
        ladder.measured("work", "units/s", steps, lambda line: None)


def test_the_plain_ways_are_plain(tmp_path):
    """Table of logits, all blocks of the tower, gradients in it: the loss is the same, and more is done for it."""
    model = Llava(TINY)
    data = Drawn(make_examples(TINY, "stage2", 3), TINY)
    batch = ladder.one_document_a_row(data)
    assert batch.documents.unique().tolist() == [-1, 0] and len(batch.labels) == 3
    torch.testing.assert_close(ladder.table_of_logits(model, batch), model.loss(batch), rtol=1e-5, atol=0)
    calls = []
    model.vision.layers[-1].register_forward_hook(lambda *_: calls.append(1))
    model.vision.requires_grad_(False)
    expected = model.loss(batch)
    assert not calls
    with ladder.whole_tower(model):
        loss = model.loss(batch)
        loss.backward()
        assert calls and model.vision.layers[1].mlp.fc1.weight.grad.abs().sum() > 0
    assert loss.item() == expected.item() and model.vision.layers[1].mlp.fc1.weight.grad is None
    assert not any(p.requires_grad for p in model.vision.parameters())


# ---------------------------------------------------------------- targets


def row(model: str, work: str, rate: float, theirs: float = 1.0, reached: float = 50, **more) -> Row:
    return Row(model, work, "u", [rate], [theirs], [reached / rate], "vector", 1e-7, True, **more)


def test_targets_stand_beside_what_was_measured():
    rows = [
        row("135m", "decode", 3.2, reached=79.4),
        row("135m", "decode, int8", 6.4),
        row("135m", "prefill", 1.9, reached=64),
        row("135m", "stage 2 step", 1.99),
        row("7b", "load", 1.2, detail={"peak of ours": [1.05]}),
    ]
    told = [(v.measured, v.reached) for v in report.verdicts(rows, on_cuda=False)]
    assert told == [
        ("3.20x", True),
        ("79%", False),
        ("2.00x", True),
        ("1.90x, 64%", False),
        ("1.99x", False),
        ("1.20x, 1.05x the weights", True),
    ]
    assert {(v.measured, v.reached) for v in report.verdicts([], on_cuda=False)} == {("not measured", None)}
    half = report.verdicts([row("7b", "load", 1.2)], on_cuda=False)[-1]
    assert half.measured == "1.20x" and half.reached is None
    assert "| 1.99x | no |" in report.targets(report.verdicts(rows, on_cuda=False))


def test_targets_of_a_gpu():
    steps = [row("7b", work, 1.6, reached=51) for work in ("stage 1 step", "stage 2 step", "stage 2 step, LoRA")]
    steps[1].detail["memory in GB"] = [60.0, 74.0]
    rows = [row("7b", "decode", 10, theirs=2, reached=86), row("7b", "decode, int8", 18), *steps]
    verdicts = report.verdicts(rows, on_cuda=True)
    assert [v.reached for v in verdicts] == [True] * 6 and verdicts[-1].measured == "74.00 GB"


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--device", "cuda:9"], "device cuda:9: not to be used here"),
        (["--device", "toaster"], "device toaster"),
        (["--models", "135m,8b"], "--models 8b: no such model; choose from miniature, 135m, 1.1b, 7b"),
        (["--quick", "--models", "7b"], "--models 7b: no such model in --quick; choose from miniature, 135m"),
        (["--out", "no/such/folder/b.json"], "--out no/such/folder/b.json: cannot be written"),
        (["--out", "."], "--out .: is a folder"),
        (["--folder", "nowhere"], "nowhere"),
        (["--ladder", "--out", "b.json"], "--ladder and --out b.json: a ladder is a table and no JSON"),
    ],
)
def test_bad_input_is_one_line(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(["--device", "cpu", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_7b_llava_is_refused(tmp_path, capsys):
    folder = Path(__file__).parent.parent / "weights/miniature"
    assert command.main(["--device", "cpu", "--folder", str(folder), "--out", str(tmp_path / "b.json")]) == 2
    assert "is no 7B LLaVA in llava-hf layout" in capsys.readouterr().err


@pytest.mark.parametrize("text", [[1], "a string", {"hidden_size": 64}])
def test_a_config_that_is_none_of_a_7b_llava_is_refused(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    assert command.main(["--device", "cpu", "--folder", str(tmp_path), "--out", str(tmp_path / "b.json")]) == 2
    assert "is no 7B LLaVA in llava-hf layout" in capsys.readouterr().err


def one_row(bench: measure.Bench, name: str):
    yield row(name, "tower", 7.0)


def test_a_table_that_nobody_reads_takes_no_figures_with_it(tiny, tmp_path, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    file = tmp_path / "b.json"
    monkeypatch.setattr(measure.Bench, "rows", one_row)
    with os.fdopen(write, "w") as nobody:
        monkeypatch.setattr(command.sys, "stdout", nobody)
        assert command.main(["--quick", "--device", "cpu", "--out", str(file)]) == 1  # as of every command
    assert json.loads(file.read_text())["complete"] is True
    assert "error" not in capsys.readouterr().err


def test_a_full_disk_takes_neither_the_table_nor_the_older_figures(tiny, tmp_path, monkeypatch, capsys):
    def full(file: Path, text: str, encoding: str) -> None:
        file.write_bytes(text.encode(encoding)[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "b.json"
    file.write_text("older figures")
    monkeypatch.setattr(measure.Bench, "rows", one_row)
    monkeypatch.setattr(Path, "write_text", full)
    assert command.main(["--quick", "--device", "cpu", "--out", str(file)]) == 2
    printed = capsys.readouterr()
    assert "| miniature | tower | 7.00 u |" in printed.out
    assert f"error: --out {file}: cannot be written (No space left on device)" in printed.err
    assert file.read_text() == "older figures" and list(tmp_path.iterdir()) == [file]


def test_figures_may_go_to_a_device(tiny, monkeypatch, capsys):
    monkeypatch.setattr(measure.Bench, "rows", one_row)
    assert command.main(["--quick", "--device", "cpu", "--out", os.devnull]) == 0
    assert not Path(os.devnull).is_file()


def test_without_room_on_the_disk_it_says_so(tiny, tmp_path, monkeypatch, capsys):
    """A model that was named is an error; otherwise its row says why it is left out."""
    monkeypatch.setattr(models.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    file = tmp_path / "b.json"
    assert command.main(["--device", "cpu", "--models", "7b", "--out", str(file)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "of disk" in lines[0] and "TMPDIR" in lines[0] and not file.exists()
    assert command.main(["--device", "cpu", "--out", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["model"] for row in rows] == list(models.MODELS)
    assert all(row["note"].startswith("skipped: takes") and "of disk" in row["note"] for row in rows)


def test_without_memory_a_row_says_so(tiny, tmp_path, monkeypatch):
    bench = measure.Bench(CPU, Limits(1, 1, 1), tmp_path, measure.FULL, lambda line: None)
    monkeypatch.setattr(measure, "free_memory", lambda device: 0)
    assert [(r.work, "skipped: takes about" in r.note) for r in bench.rows("7b")] == [("load", True)]
    assert [(r.work, "skipped: takes about" in r.note) for r in bench.rows("1.1b")] == [("all", True)]
    monkeypatch.setattr(training, "free_memory", lambda device: 0)
    rows = list(training.rows(bench, "1.1b", tmp_path))
    assert [row.work for row in rows] == ["stage 1 step", "stage 2 step"]
    assert all("GB of memory" in row.note and row.rate is None for row in rows)


@pytest.mark.parametrize(("raised", "status"), [(KeyboardInterrupt(), 130), (Error("gone"), 2)])
def test_what_was_measured_is_told_when_it_ends_early(raised, status, tiny, tmp_path, monkeypatch, capsys):
    def rows(bench: measure.Bench, name: str):
        yield row(name, "tower", 7.0)
        raise raised

    monkeypatch.setattr(measure.Bench, "rows", rows)
    file = tmp_path / "b.json"
    assert command.main(["--quick", "--device", "cpu", "--out", str(file)]) == status
    content = json.loads(file.read_text())
    assert "| miniature | tower | 7.00 u |" in capsys.readouterr().out
    assert len(content["rows"]) == 1 and content["complete"] is False


def test_a_load_that_fails_says_what_was_said(tmp_path):
    with pytest.raises(Error, match=r"loading .* \(ours\): .*nowhere: no such folder"):
        load.in_new_process("ours", tmp_path / "nowhere", CPU, torch.float32)


@pytest.mark.parametrize(
    ("words", "device", "efforts"), [([], "cpu", "FULL"), ([], "cuda", "ON_GPU"), (["--quick"], "cuda", "QUICK")]
)
def test_a_gpu_is_given_more_to_do(words, device, efforts, monkeypatch):
    seen = []
    monkeypatch.setattr(measure.Bench, "rows", lambda bench, name: iter(seen.append(bench.efforts) or ()))
    args = command.arguments(words)
    assert list(command.measured(args, torch.device(device), ["miniature"], Limits(1.0, 2.0, 3.0))) == []
    assert seen == [getattr(measure, efforts)]
