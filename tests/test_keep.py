"""The last K checkpoints of a run, the lock on its folder, the images it began with, and kills at any moment."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from nanollava import weights
from nanollava.checkpoint import load
from nanollava.error import Error
from nanollava.folder import last_good
from nanollava.train import keep, loop, resume
from nanollava.train.keep import alone, keep_older

ROOT = Path(__file__).parents[1]
TURNS = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A star."}]
RECORDS = [{"id": name, "image": f"{name}.png", "conversations": TURNS} for name in "abcd"]
RUN = ("--steps", 9, "--batch-size", 2, "--lr", 1e-2, "--log-every", 1)
KILLED = """
import json, os, random, sys, time, torch
torch.set_num_threads(1)
import train
words, out, undisturbed, seed = sys.argv[1:-3], sys.argv[-3], sys.argv[-2], int(sys.argv[-1])
started = time.process_time()  # what another program delays does not count
assert train.main([undisturbed if word == out else word for word in words]) == 0
seconds, chance = time.process_time() - started, random.Random(seed)
for attempt in range(8):
    done = train.progress(train.Path(out))
    if done == "finished":  # and killed behind its last save
        break
    begun = done == "begun"
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(train.main(words + ["--resume"] * begun))
    time.sleep(chance.uniform(0.02, 0.25) * seconds)
    os.kill(child, 9)
    _, status = os.waitpid(child, 0)
    print("status", status, sorted(os.listdir(os.path.dirname(out))), flush=True)
    if status != 9:
        break
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "records.json"
    file.write_text(json.dumps(RECORDS))
    return file


def losses(folder: Path) -> list[tuple]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in entries]


def same(one: Path, other: Path) -> bool:
    """Whether two folders have the same losses and weights, bit for bit."""
    mine, theirs = load(one).state_dict(), load(other).state_dict()
    return losses(one) == losses(other) and all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def undisturbed(trainer, data) -> Path:
    assert trainer.stage(2, data, data.parent / "undisturbed", *RUN) == 0
    return data.parent / "undisturbed"


# ---------------------------------------------------------------- the last K


def kept(out: Path) -> list[str]:
    return sorted(os.listdir(out / "checkpoints"))


def test_the_last_checkpoints_stay_load_and_can_be_gone_on_from(trainer, data, undisturbed, tmp_path):
    """Saves at 2, 4, 6, 8 and at the end, of which three stay."""
    out = tmp_path / "out"
    assert trainer.stage(2, data, out, *RUN, "--save-every", 2, "--keep", 3) == 0
    assert kept(out) == ["step-000006", "step-000008"] and same(out, undisturbed)
    for step in (6, 8):
        folder = out / "checkpoints" / f"step-{step:06}"
        assert sorted(os.listdir(folder)) == sorted([*set(os.listdir(out)) - {"checkpoints"}, "training.pt"])
        assert len(losses(folder)) == step and load(folder).config.stage == "stage2"
        shutil.copytree(folder, tmp_path / f"{step}")
        assert trainer.stage(2, data, tmp_path / f"{step}", *RUN, "--resume") == 0
        assert same(tmp_path / f"{step}", undisturbed)


def test_keeping_writes_no_file_a_second_time(trainer, data, tmp_path, monkeypatch):
    out, files = tmp_path / "out", []

    def spy(out, new, *rest):
        files.append({file.name: file.stat().st_ino for file in out.iterdir() if file.is_file()})
        keep_older(out, new, *rest)

    monkeypatch.setattr(resume, "keep_older", spy)
    assert trainer.stage(2, data, out, *RUN, "--save-every", 4, "--keep", 3) == 0
    for inodes, step in zip(files, ("step-000004", "step-000008"), strict=True):
        assert {file.name: file.stat().st_ino for file in (out / "checkpoints" / step).iterdir()} == inodes


def test_without_keep_one_stays_and_what_is_in_checkpoints_is_left_alone(trainer, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert trainer.stage(2, data, out, *RUN, "--save-every", 2) == 0
    assert not (out / "checkpoints").exists()
    out = begun(trainer, data, tmp_path / "begun", monkeypatch, "--keep", 3)
    assert kept(out) == ["step-000002", "step-000004"]
    (out / "checkpoints" / "step-000002").rename(out / "checkpoints" / "best")
    shutil.copytree(out, tmp_path / "two")
    assert trainer.stage(2, data, out, *RUN, "--save-every", 2, "--resume") == 0
    assert kept(out) == ["best", "step-000004"]
    assert trainer.stage(2, data, tmp_path / "two", *RUN, "--save-every", 2, "--resume", "--keep", 2) == 0
    assert kept(tmp_path / "two") == ["best", "step-000008"]


@pytest.mark.parametrize(("step", "stay"), [(6, [6, 1_000_000]), (1_000_000, [999_999, 1_000_000])])
def test_a_run_that_went_back_to_a_kept_checkpoint_keeps_it_once_more(step, stay, tmp_path):
    """OUT is again what one of the folders in checkpoints is; 1,000,000 comes after 999,999."""
    out, new = tmp_path / "out", tmp_path / "new"
    for folder in (out, *(out / "checkpoints" / f"step-{number:06}" for number in (6, 999_999, 1_000_000))):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(folder.name)
    new.mkdir()
    keep_older(out, new, step, 2)
    assert set(kept(new)) == {f"step-{number:06}" for number in stay}
    assert (new / "checkpoints" / f"step-{step:06}" / "model.safetensors").read_text() == "out"


def begun(trainer, data: Path, out: Path, monkeypatch, *words: object) -> Path:
    """A run that ended in its seventh step, with saves at 2, 4 and 6."""
    with monkeypatch.context() as patch:
        report = loop.Run.report

        def stops(self, *rest):
            if self.step == 7:
                raise KeyboardInterrupt
            report(self, *rest)

        patch.setattr(loop.Run, "report", stops)
        assert trainer.stage(2, data, out, *RUN, "--save-every", 2, *words) == 130
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("what", ["weights", "links", "state"])
def test_a_disk_that_runs_full_loses_none_of_those_kept(
    what, trainer, data, undisturbed, tmp_path, monkeypatch, capsys
):
    """At the fourth save, that of step 8, when two are kept beside that of step 6."""
    out = begun(trainer, data, tmp_path / "out", monkeypatch, "--keep", 3)
    before = contents(out)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if what == "links":
            patch.setattr(os, "link", full)
            patch.setattr(shutil, "copy2", full)
        else:
            patch.setattr(*((weights, "save_file") if what == "weights" else (torch, "save")), full)
        assert trainer.stage(2, data, out, *RUN, "--save-every", 2, "--keep", 3, "--resume") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert contents(out) == before and os.listdir(tmp_path) == ["out"]
    assert trainer.stage(2, data, out, *RUN, "--save-every", 2, "--keep", 3, "--resume") == 0
    assert same(out, undisturbed) and kept(out) == ["step-000006", "step-000008"]


def test_only_folders_that_a_run_kept_are_counted_and_go(tmp_path):
    """What a user puts there is neither deleted nor takes the place of a checkpoint."""
    out, new = tmp_path / "out", tmp_path / "new"
    mine = {"step-3ok", "step-000003-best", "step-4", "step-00001", "step-4.txt", "step-000002"}
    for name in (*mine - {"step-4.txt", "step-000002"}, "step-000003", "step-000004"):
        (out / "checkpoints" / name).mkdir(parents=True)
    for name in ("step-4.txt", "step-000002"):
        (out / "checkpoints" / name).write_text("notes")
    new.mkdir()
    keep_older(out, new, 5, 2)
    assert set(kept(new)) == mine | {"step-000004", "step-000005"}


def test_a_file_called_checkpoints_is_not_lost(trainer, data, undisturbed, tmp_path, monkeypatch, capsys):
    out = begun(trainer, data, tmp_path / "out", monkeypatch)
    (out / "checkpoints").write_text("mine")
    assert trainer.stage(2, data, out, *RUN, "--save-every", 2, "--keep", 3, "--resume") == 0
    assert f"{out / 'checkpoints'}: no folder" in capsys.readouterr().out
    assert (out / "checkpoints").read_text() == "mine" and same(out, undisturbed)


# ---------------------------------------------------------------- kills


def test_kills_at_any_moment_lose_no_checkpoint_and_move_no_loss(trainer, data, tmp_path):
    """Up to eight kill -9 of one run after random times, in which it starts, trains, saves (at every step) and ends."""
    out, whole, seed = tmp_path / "runs" / "out", tmp_path / "whole", random.SystemRandom().randrange(10**6)
    start = ("--vision", trainer.clip, "--language", trainer.vicuna, "--images", trainer.images, "--device", "cpu")
    words = ("--steps", 16, "--batch-size", 2, "--lr", 1e-2, "--save-every", 1, "--keep", 3)
    command = [str(word) for word in ("stage2", "--data", data, "--out", out, *start, *words)]
    line = [sys.executable, "-c", KILLED, *command, str(out), str(whole), str(seed)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    told = f"seed {seed}: {done.stdout} {done.stderr}"
    assert done.returncode == 0 and "status 9 " in done.stdout, told
    assert "Traceback" not in done.stderr and "error" not in done.stderr, told
    finished = resume.progress(out) == "finished"
    last = done.stdout.split("status ")[-1]
    if not finished:
        going_on = ["--resume"] if resume.progress(out) == "begun" else []
        here = last_good(out)
        for folder in (here, *(here / "checkpoints").glob("step-*")) if going_on else ():
            assert load(folder).config.stage == "stage2", told
            assert losses(folder) == losses(whole)[: len(losses(folder))], told
        assert train.main(command + going_on) == 0, told
    assert same(out, whole) and kept(out) == ["step-000014", "step-000015"], told
    killed_behind = {".out.lock", ".out.previous"} if finished and last.startswith("9 ") else set()
    assert set(os.listdir(tmp_path / "runs")) - killed_behind == {"out"}, told


# ---------------------------------------------------------------- the lock


def test_two_runs_to_one_folder_are_one_too_many(trainer, data, tmp_path, capsys):
    """Said before the records are read; the folder is free again as soon as the other run is over."""
    out = tmp_path / "deep" / "out"
    with alone(out):
        assert trainer.stage(2, tmp_path / "nowhere.json", out, *RUN) == 2
        assert capsys.readouterr().err.startswith(f"error: {out}: another run is writing to it; wait for its end")
        with pytest.raises(Error, match="another run"), alone(tmp_path / "deep" / ".." / "deep" / "out"):
            pass
        with alone(tmp_path / "deep" / "other"):
            pass
    assert trainer.stage(2, data, out, *RUN) == 0
    assert os.listdir(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("more", [(), ("--resume",)], ids=str)
def test_the_root_of_the_disk_is_no_out(more, trainer, data, capsys):
    assert trainer.stage(2, data, Path("/"), *RUN, *more) == 2
    assert capsys.readouterr().err == "error: /: is the root of the disk; choose a folder below it\n"


def test_the_lock_of_a_killed_run_holds_nobody_back(tmp_path):
    script = "import os, sys, pathlib; from nanollava.train.keep import alone\n"
    script += "with alone(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", script, tmp_path / "out"], cwd=ROOT).returncode == -9
    assert os.listdir(tmp_path) == [".out.lock"]
    with alone(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_lock_that_its_owner_just_removed_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    """Between our opening the file and locking it the other run ends, and a third one makes a file of that name."""
    flock, calls = keep.fcntl.flock, []

    def late(handle, how):
        if not calls:
            (tmp_path / ".out.lock").unlink()
            (tmp_path / ".out.lock").touch()
        calls.append(handle)
        flock(handle, how)

    monkeypatch.setattr(keep.fcntl, "flock", late)
    with alone(tmp_path / "out"):
        assert len(calls) == 2
        with pytest.raises(Error, match="another run"), alone(tmp_path / "out"):
            pass


@pytest.mark.parametrize("how", ["no such module", "refused by the disk"])
def test_where_there_are_no_locks_training_goes_without(how, trainer, data, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    if how == "no such module":
        monkeypatch.setattr(keep, "fcntl", None)
    else:
        monkeypatch.setattr(keep.fcntl, "flock", refuse)
    assert trainer.stage(2, data, tmp_path / "out", *RUN) == 0


# ---------------------------------------------------------------- other images


def test_a_run_is_not_resumed_with_other_images_but_with_the_same_elsewhere(
    trainer, data, undisturbed, tmp_path, monkeypatch, capsys
):
    out = begun(trainer, data, tmp_path / "out", monkeypatch)
    shutil.copytree(trainer.images, tmp_path / "moved")
    shutil.copytree(trainer.images, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "b.png", tmp_path / "other" / "d.png")
    with (tmp_path / "other" / "d.png").open("ab") as file:
        file.write(b"one more")
    assert trainer.stage(2, data, out, *RUN, "--images", tmp_path / "other", "--resume") == 2
    assert "different images: files (sizes of the first: checksum" in capsys.readouterr().err
    assert trainer.stage(2, data, out, *RUN, "--images", tmp_path / "moved", "--resume") == 0
    assert same(out, undisturbed)
