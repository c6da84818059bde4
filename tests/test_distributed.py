"""Two processes under torchrun (gloo, on a CPU) against one: losses, gradients, weights, folders, mistakes, Ctrl-C.

The oracle is the same command without torchrun, which test_train.py holds to the records one by one.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from nanollava import checkpoint
from nanollava import folder as files
from nanollava.checkpoint import load
from nanollava.error import Error
from nanollava.llama import Llama, LlamaConfig
from nanollava.tokenizer import load_tokenizer
from nanollava.train import distributed, loop
from nanollava.train.data import documents, pack
from nanollava.train.machine import deferred_interrupt
from nanollava.train.records import read_records
from nanollava.train.stages import STAGES

ROOT = Path(__file__).parents[1]
TOGETHER = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
LONGEST = 150  # positions of a row: two records never share one
WORKER = """
import json, sys, torch
torch.set_num_threads(1)
import train
from nanollava.train import distributed, loop
leave, distributed.leave = distributed.leave, lambda: None  # several commands, one after the other
report = loop.Run.report
for cut, words in json.load(open(sys.argv[1])):
    def cut_short(self, *rest):
        if self.step == cut:
            raise KeyboardInterrupt
        report(self, *rest)
    loop.Run.report = cut_short
    assert train.main(words) == (130 if cut else 0), words
leave()
distributed.end(0)
"""
FAILS = """
import sys, torch
import train
from nanollava.error import Error
from nanollava.train import distributed, loop
distributed.GRACE = 0.5
def fails(self, batches):
    self.step += 1
    if distributed.rank() == 1:
        raise MISTAKE
    distributed.summed(0)  # waits for the other
loop.Run.update = fails
distributed.end(train.main(sys.argv[1:]))
"""
MISTAKES = {
    "a mistake": ('Error("this one has had enough")', "this one has had enough"),
    "memory": ("torch.OutOfMemoryError()", "step 1 does not fit into memory, with 1 row of 128 positions at once: "),
}
DIES = """
import os, signal, sys, torch
import train
from nanollava.train import distributed, loop
if distributed.rank() != DYING:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun may look before it has met the loss
update = loop.Run.update
def dies(self, batches):
    if self.step == 3 and distributed.rank() == DYING:
        os.kill(os.getpid(), 9)
    return update(self, batches)
loop.Run.update = dies
distributed.end(train.main(sys.argv[1:]))
"""
MIXED = """
import sys, torch
import train
from nanollava.train import distributed, loop, stages
def as_on_cuda(part, stage, optimizer, device, lora):
    return torch.bfloat16 if part == "vision" or (lora and part == "language") else torch.float32
def loss(self, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return self.model.loss(batch)
train.precision = stages.precision = as_on_cuda
loop.Run.loss = loss
distributed.end(train.main(sys.argv[1:]))
"""


def record(name: str, image: str | None, *turns: str) -> dict:
    conversations = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": name, **({"image": image} if image else {}), "conversations": conversations}


CAPTIONS = [record(f"c{i}", f"{name}.png", "<image>", f"A ball and {i} stars.") for i, name in enumerate("abcd")]
TEXTS = [record(f"t{i}", None, f"What is {i}?", f"It is {i} and {i * i}.") for i in range(3)]
TALKS = [
    record("a1", "a.png", "<image>\nWhat color is the ball?", "The ball is blue."),
    record("a2", "a.png", "<image>\nWhat color is the star?", "Red."),
    *TEXTS[:2],
    record("b1", "b.png", "What is this?\n<image>", "A star.", "And its size?", "It is small."),
    record("c1", "c.png", "<image>\nIs there a circle?", "There are three."),
]
BROKEN = [record("x", "half.png", "<image>\nWhat?", "No."), record("y", "half.png", "<image>\nWhy?", "So.")]
SHORT = ("--max-length", LONGEST, "--lr", 1e-2, "--log-every", 1)
RESUMED = (2, TALKS, "--steps", 6, "--batch-size", 3, "--save-every", 2, *SHORT)
LORA = ("--lora", 5, "--lora-dropout", 0, "--projector-lr", 1e-2)  # a rank that two cannot share alike
ADAPTED = (*RESUMED, *LORA)
STAGE_1 = (1, CAPTIONS, "--steps", 5, "--batch-size", 3, "--projector", "mlp2x_gelu", "--max-length", 20)
LIGHTER = ("--optimizer", "light", "--max-length", LONGEST, "--lr", 1e-3, "--log-every", 1)
LIGHT = (*RESUMED[: -len(SHORT)], *LIGHTER)
CASES = {
    "stage 1, three rows": STAGE_1,
    "three rows, validation on five": (*RESUMED, "--val-every", 2, "--val", TALKS[:5]),
    "one row": (2, TALKS, "--steps", 8, "--batch-size", 1, *SHORT),
    "five rows, one at a time": (2, TALKS, "--steps", 4, "--batch-size", 5, "--rows-at-once", 1, *SHORT),
    "text alone": (2, TEXTS, "--steps", 4, "--batch-size", 3, "--save-every", 2, "--keep", 2, *SHORT),
    "shared images, Muon": (2, TALKS, "--steps", 4, "--optimizer", "muon", "--share-images", "--parallel", 2, *SHORT),
    "one matrix for words in and out": (2, TALKS, "--steps", 4, "--language", "tied", *SHORT),
    "damaged pictures": (2, TALKS[:3] + BROKEN, "--steps", 3, "--batch-size", 5, *SHORT),
    "a step of damaged pictures": (2, TALKS[:1] + BROKEN[:1], "--steps", 4, "--batch-size", 1, *SHORT),
    "adapters, validation on five": (*ADAPTED, "--val-every", 2, "--val", TALKS[:5]),
    "adapters, one row": (2, TALKS, "--steps", 8, "--batch-size", 1, *LORA, *SHORT),
    "adapters, text alone, recomputed": (2, TEXTS, "--steps", 4, "--rows-at-once", 1, "--recompute", *LORA, *SHORT),
    "cached features, adapters": (2, TALKS, "--steps", 6, "--batch-size", 3, "--cache-features", "kept", *LORA, *SHORT),
    "cached features, whitened": (*STAGE_1, "--whiten", "--cache-features", "kept"),
    "light, validation on five": (*LIGHT, "--val-every", 2, "--val", TALKS[:5]),
    "light, five rows, one at a time": (2, TALKS, "--steps", 4, "--batch-size", 5, "--rows-at-once", 1, *LIGHTER),
    "light, one row": (2, TALKS, "--steps", 8, "--batch-size", 1, *LIGHTER),
}

CUT = {"": RESUMED, "adapters: ": ADAPTED, "light: ": LIGHT}  # cut by one number of processes, gone on with by another


@pytest.fixture(scope="module")
def place(trainer, tmp_path_factory) -> Path:
    """A folder with images, one of them cut in half, and a language model with one matrix for words in and out."""
    place = tmp_path_factory.mktemp("distributed")
    shutil.copytree(trainer.images, place / "images")
    (place / "images" / "half.png").write_bytes((trainer.images / "a.png").read_bytes()[:900])
    torch.manual_seed(1)
    tied = Llama(LlamaConfig(400, 32, 16, 2, 2, 1, tie_word_embeddings=True))
    checkpoint.save_language(tied, load_tokenizer(trainer.vicuna), place / "tied")
    return place


@pytest.fixture(scope="module")
def command(trainer, place):
    """A function: (case, name of the folder to make) -> the words of the command."""

    def command(case: tuple, out: str, *more: object) -> list[str]:
        stage, records, *words = case
        start = {"--vision": trainer.clip, "--language": trainer.vicuna, "--images": place / "images"}
        for i, word in enumerate(words):
            if isinstance(word, list):
                words[i] = write(place, word)
            if word == "tied":
                words[i] = place / "tied"
            if word == "kept":
                words[i] = place / f"{out}.kept"
        parts = {**start, "--device": "cpu", "--out": place / out}
        all_words = (
            f"stage{stage}",
            "--data",
            write(place, records),
            *(x for pair in parts.items() for x in pair),
            *words,
            *more,
        )
        return [str(word) for word in all_words]

    return command


def write(folder: Path, records: list[dict]) -> Path:
    file = folder / f"{'-'.join(item['id'] for item in records)}.json"
    file.write_text(json.dumps(records))
    return file


def launch(*words: object, limit: float = 120) -> subprocess.CompletedProcess:
    """Two processes of a Python command; all are ended where they take too long."""
    line = [*TOGETHER, *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        try:
            out, err = process.communicate(timeout=limit)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(line, process.returncode, out, err)


@pytest.fixture(scope="module")
def runs(place, command, tmp_path_factory) -> subprocess.CompletedProcess:
    """All cases by one process and by two: NAME.1 and NAME.2; two runs cut by the other kind and gone on with."""
    for name, case in CASES.items():
        assert train.main(command(case, f"{name}.1")) == 0
    for name, case in CUT.items():
        assert train.main(command(case, f"{name}undisturbed")) == 0
        cut(command(case, f"{name}one, then two"))
    script = tmp_path_factory.mktemp("worker") / "worker.py"
    script.write_text(WORKER)
    commands = [(None, command(case, f"{name}.2")) for name, case in CASES.items()]
    for name, case in CUT.items():
        commands.append((None, command(case, f"{name}one, then two", "--resume")))
        commands.append((3, command(case, f"{name}two, then one")))
    script.with_suffix(".json").write_text(json.dumps(commands))
    done = launch(script, script.with_suffix(".json"), limit=600)
    assert done.returncode == 0, done.stderr
    for name, case in CUT.items():
        shutil.copytree(place / f"{name}two, then one", place / f"{name}two, cut")
        assert train.main(command(case, f"{name}two, then one", "--resume")) == 0
    return done


def cut(words: list[str]) -> None:
    """A run that is ended in its third step, after a save at its second."""
    report = loop.Run.report

    def cut_short(self, *rest):
        if self.step == 3:
            raise KeyboardInterrupt
        report(self, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "report", cut_short)
        assert train.main(words) == 130


def metrics(folder: Path) -> list[dict]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    own = ("tokens_per_s", "padding")  # rows of several processes are filled up apart
    return [{name: value for name, value in entry.items() if name not in own} for entry in entries]


def known(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if value is not None}


def agree(one: Path, other: Path, light: bool) -> None:
    """Losses, norms of gradients, rates and weights to what float32 sums in another order differ by. The light
    optimizer's gradients are bfloat16, of 8 bits, and each process rounds by its own chance: weights wander apart by
    some last bits (of 2^-7 at most) or some steps of 1e-3."""
    for mine, theirs in zip(metrics(one), metrics(other), strict=True):
        assert {name for name in mine if mine[name] is None} == {name for name in theirs if theirs[name] is None}
        norms = mine.pop("grad_norm"), theirs.pop("grad_norm")
        assert norms == (None, None) or norms[0] == pytest.approx(norms[1], rel=3e-2 if light else 1e-5)
        assert known(mine) == pytest.approx(known(theirs), rel=3e-3 if light else 1e-5)
    mine, theirs = load(one).state_dict(), load(other).state_dict()
    rtol, atol = (2**-5, 1e-2) if light else (1e-4, 1e-5)
    torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_losses_and_the_weights_of_one(name, place, runs):
    agree(place / f"{name}.1", place / f"{name}.2", "light" in name)


def test_two_records_never_share_a_row(place, runs):
    """So that a step of three has three rows, and a step of one leaves a process without any."""
    model = load(place / "one row.1")
    for stage, records, limit in (("stage1", CAPTIONS, 20), ("stage2", TALKS, LONGEST), ("stage2", TEXTS, LONGEST)):
        template = STAGES[stage].template
        examples, _ = read_records(write(place, records), place / "images", model.tokenizer, model.config, template)
        docs = [doc for example in examples for doc in documents([example], 4, limit)]
        assert len(pack(docs, limit)) == len(records)


@pytest.mark.parametrize("name", ["one, then two", "two, then one"])
@pytest.mark.parametrize("kind", CUT)
def test_a_run_goes_on_with_another_number_of_processes(kind, name, place, runs):
    assert runs.stdout.count("resuming at step 2 of 6") == len(CUT)
    agree(place / (kind + name), place / f"{kind}undisturbed", "light" in kind)


def test_two_processes_leave_a_lora_run_as_one_does_until_the_end(place, runs, command):
    """Files, names, shapes and numbers of what was trained, and nothing of the base."""
    cut(command(ADAPTED, "one, cut"))
    one, two = place / "one, cut", place / "adapters: two, cut"
    assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in two.iterdir())
    assert (one / "adapter_config.json").read_text() == (two / "adapter_config.json").read_text()
    for file in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        mine, theirs = dict(files.tensors(one / file)), dict(files.tensors(two / file))
        assert all(type(x) is torch.Tensor for x in theirs.values())
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert not (two / "model.safetensors").exists()


def test_a_folder_is_the_same_whoever_writes_it(place, runs):
    for name in CASES:
        one, two = (
            sorted(p.relative_to(place / f"{name}.{n}") for p in (place / f"{name}.{n}").rglob("*")) for n in "12"
        )
        assert one == two and Path("model.safetensors") in one
    assert (place / "text alone.2" / "checkpoints" / "step-000002" / "training.pt").is_file()


def test_one_process_prints_and_damage_is_told_by_whoever_found_it(place, runs):
    assert runs.stdout.count("stage1 is done") == 2
    validated = sum("--val" in case for case in CASES.values())
    assert runs.stdout.count("records read in") == len(CASES) + validated + 2 * len(CUT)
    assert runs.stdout.count("--parallel 2: left out, the processes of torchrun compute side by side") == 1
    assert runs.stdout.count("skipped: 2 records, for 1 damaged images") == 1
    assert "half.png" in runs.stderr


# ---------------------------------------------------------------- mistakes and Ctrl-C


def test_a_mistake_that_all_make_is_one_line(command, place):
    words = command(RESUMED, "mistake")
    words[words.index("--data") + 1] = str(place / "nowhere.json")
    done = launch("train.py", *words)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and errors == [f"error: {place / 'nowhere.json'}: " + errors[0].split(": ", 2)[2]]
    assert done.stderr.count("Traceback") == 1  # torchrun's own last words


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_of_one_ends_all_and_is_one_line(kind, command, tmp_path):
    (tmp_path / "fails.py").write_text(FAILS.replace("MISTAKE", MISTAKES[kind][0]))
    done = launch(tmp_path / "fails.py", *command(RESUMED, f"one fails, {kind}"))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1 and errors[0].startswith(f"error: {MISTAKES[kind][1]}")
    assert done.stderr.count("Traceback") == 1


@pytest.mark.parametrize("dying", [0, 1])
def test_a_process_that_is_killed_ends_all_with_one_line(dying, command, tmp_path):
    (tmp_path / "dies.py").write_text(DIES.replace("DYING", str(dying)))
    done = launch(tmp_path / "dies.py", *command(RESUMED, f"{dying} is killed"))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and done.stderr.count("Traceback") == 1, done.stderr
    assert len(errors) == 1 and "another process of this run ended" in errors[0] and "--resume" in errors[0]


def test_who_has_lost_another_tells_before_torchrun_ends_it(one_of_two):
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert distributed.may_tell(lost=True) and signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_what_a_launcher_passes_on_once_more_does_not_break_into_the_end_of_a_run(one_of_two):
    before = signal.getsignal(signal.SIGINT)
    try:
        with deferred_interrupt() as pressed:
            signal.raise_signal(signal.SIGINT)
            assert pressed()
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        pytest.fail("it did")
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("together", [True, False])
def test_what_breaks_while_a_process_ends_does_not_change_its_status(together):
    """os.abort in the place of a thread of gloo; without torchrun nothing is kept from ending as it does."""
    code = "import atexit, os; from nanollava.train import distributed; atexit.register(os.abort)"
    environment = os.environ | ({"WORLD_SIZE": "2"} if together else {})
    words = [sys.executable, "-c", f"{code}; print('all is saved'); distributed.end(130)"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == (130 if together else -signal.SIGABRT)
    assert not together or done.stdout == "all is saved\n"


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK"])
def test_an_environment_without_numbers_is_one_line(name, one_of_two, capsys):
    one_of_two.setenv(name, "abc")
    assert train.main(["stage2"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {name} is abc")


def test_a_frozen_base_in_bfloat16_is_shared_beside_float32_adapters(place, command, tmp_path):
    """The dtypes of CUDA, by CPU's autocast: losses of two processes and of one, to bfloat16's 8 bits."""
    (tmp_path / "mixed.py").write_text(MIXED)
    one, two = (command((2, TALKS, "--steps", 4, "--batch-size", 3, *LORA, *SHORT), f"mixed.{n}") for n in "12")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, tmp_path / "mixed.py", *one], check=True, env=environment, cwd=ROOT)
    done = launch(tmp_path / "mixed.py", *two)
    assert done.returncode == 0, done.stderr
    for mine, theirs in zip(metrics(place / "mixed.1"), metrics(place / "mixed.2"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)
    stored = {name: x.dtype for name, x in files.tensors(place / "mixed.2" / "model.safetensors")}
    assert set(stored.values()) == {torch.bfloat16}


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_ctrl_c_saves_once_and_is_resumed(command, place):
    """Pressed at a terminal it reaches torchrun, which passes it on."""
    words = command((2, TALKS, "--steps", 10_000, "--batch-size", 3, "--save-every", 0, *SHORT), "pressed")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*TOGETHER, "train.py", *words],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
    ) as process:  # fmt: skip
        try:
            assert any(" 3/10000 " in line for line in process.stdout)
            os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert err.count("Ctrl-C: saving after this step") == 1
    assert err.count("interrupted: go on with the same command and --resume") == 1
    steps = len(metrics(place / "pressed"))
    assert steps >= 3 and torch.load(place / "pressed" / "training.pt")["step"] == steps
    assert sorted(p.name for p in place.iterdir() if "pressed" in p.name) == ["pressed"]


@pytest.fixture
def one_of_two(monkeypatch):
    """As if torchrun had started this process, without another one to be found."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_what_cannot_be_done_together_is_one_line(one_of_two, tmp_path, capsys):
    assert train.main(["miniature", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: miniature trains in one process: start it without torchrun\n"
    with pytest.raises(Error, match="--device mps: several processes train on cuda or on cpu"):
        distributed.join("mps")
    with pytest.raises(Error, match=r"do not find each other \(.*MASTER_ADDR.*\); start them by torchrun"):
        distributed.join("cpu")
    one_of_two.setattr(torch.cuda, "is_available", lambda: True)
    one_of_two.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Error, match="2 processes or more on a machine of 1 GPUs: say --nproc-per-node 1"):
        distributed.join("cuda")


def test_without_torchrun_nothing_is_shared():
    batch = object()
    assert distributed.processes() == 1 and distributed.rank() == 0 and distributed.may_tell()
    assert distributed.summed(1, 2.5) == [1, 2.5] and distributed.level([batch]) == [batch]
    assert distributed.gathered({"a": [1]}) == {"a": [1]} and distributed.union({"a"}) == {"a"}
