"""Curves of two optimizers beside each other: the runs are train.py's, the table and the picture show what is there."""

import json
import shutil
from pathlib import Path

import pytest

from nanollava.train import curves, loop
from nanollava.train.resume import progress

FALLING = {
    ("adamw", 0): [(10, 1.0), (20, 0.5), (30, 0.2), (40, 0.1)],
    ("adamw", 1): [(10, 1.1), (20, 0.6), (30, 0.3), (40, 0.1)],
    ("adamw", 2): [(10, 1.2), (20, 0.7), (30, 0.4), (40, 0.1)],
    ("light", 0): [(10, 1.0), (20, 0.5), (30, 0.2), (40, 0.11)],
    ("light", 1): [(10, 1.2), (20, 0.6), (30, 0.3), (40, 0.11)],
    ("light", 2): [(10, 1.4), (20, 0.7), (30, 0.1), (40, 0.11)],
}


def test_the_table_has_all_runs_and_says_where_means_are_farther_apart_than_seeds():
    lines = curves.table(FALLING).splitlines()
    assert lines[0] == "| optimizer | seed | step 10 | step 20 | step 30 | step 40 |"
    assert lines[6] == "| light | 1 | 1.2000 | 0.6000 | 0.3000 | 0.1100 |"
    assert lines[9] == "step 10: light's mean loss is AdamW's +0.1000, within the spread of AdamW's seeds, 0.2000"
    assert lines[12] == "step 40: light's mean loss is AdamW's +0.0100, outside the spread of AdamW's seeds, 0.0000"


def test_the_picture_shows_each_optimizer_in_its_colour_and_lower_losses_lower():
    image = curves.plot(FALLING)
    colours = {image.getpixel((x, y)) for x in range(image.width) for y in range(100, image.height)}
    assert {tuple(bytes.fromhex(c[1:])) for c in curves.COLOURS.values()} <= colours
    axes = curves.Axes(40, 0.1, 1.0)
    left, top, right, bottom = axes.box
    assert axes.place(0, 1.0) == (left, top) and axes.place(40, 0.1) == (right, bottom)
    assert axes.place(20, 0.1**0.5) == ((left + right) / 2, pytest.approx((top + bottom) / 2))


@pytest.fixture(scope="module")
def miniature(trainer, tmp_path_factory) -> Path:
    """A folder with stage1/ and the least of a world/."""
    folder = tmp_path_factory.mktemp("miniature")
    world = folder / "world"
    world.mkdir()
    (world / "images").symlink_to(trainer.images)
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A small red star."}]
    records = [{"id": name, "image": f"{name}.png", "conversations": turns} for name in "abcd"]
    for name in ("captions", "instruct", "instruct_val"):
        (world / f"{name}.json").write_text(json.dumps(records))
    assert trainer.stage(1, world / "captions.json", folder / "stage1", "--steps", 1) == 0
    return folder


@pytest.mark.parametrize("optimizer", ["adamw", "light"])
def test_a_run_is_the_one_that_train_py_makes(optimizer, trainer, miniature, tmp_path):
    words = ("--share-images", "--batch-size", 2, "--lr", 1e-2, "--seed", 2, "--steps", 4, "--val-every", 1)
    data = ("--model", miniature / "stage1", "--val", miniature / "world/instruct_val.json", "--optimizer", optimizer)
    assert trainer.stage(2, miniature / "world/instruct.json", tmp_path / "typed", *data, *words) == 0
    curves.stage2(miniature, tmp_path / "run", optimizer, seed=2, steps=4, lr=1e-2, batch_size=2)
    assert losses(tmp_path / "run") == losses(tmp_path / "typed") and len(curves.read_curve(tmp_path / "run", 4)) == 4


def test_a_run_that_was_killed_goes_on_with_what_it_has_saved(miniature, tmp_path, monkeypatch):
    stage2 = lambda out: curves.stage2(miniature, out, "adamw", seed=0, steps=40, lr=1e-2, batch_size=2)  # noqa: E731
    with monkeypatch.context() as patch:
        report = loop.Run.report
        patch.setattr(loop.Run, "report", lambda run, *rest: report(run, *rest) if run.step < 5 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage2(tmp_path / "killed")
    assert progress(tmp_path / "killed") == "begun" and len(losses(tmp_path / "killed")) == 4
    stage2(tmp_path / "killed")
    stage2(tmp_path / "whole")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert [step for step, _ in curves.read_curve(tmp_path / "killed", 40)] == list(range(2, 42, 2))


# ---------------------------------------------------------------- what goes wrong


def metrics(steps: int, loss: str = "0.5") -> str:
    """metrics.jsonl of a run of 40 steps, or of the first of them."""
    entries = (
        f'{{"step": {n}, "loss": 1' + (f', "val_loss": {loss}' if n % 2 == 0 else "") for n in range(1, steps + 1)
    )
    return "".join(entry + "}\n" for entry in entries)


def finished(folder: Path, **files: str) -> Path:
    """Six runs as they are when they are over; ``files`` holds what metrics.jsonl of some is instead."""
    for name, seed in FALLING:
        run = folder / f"{name}-{seed}"
        run.mkdir(parents=True)
        (run / "config.json").write_text("{}")
        (run / "metrics.jsonl").write_text(files.get(f"{name}{seed}", metrics(40)))
    return folder


def called(miniature: Path, runs: Path, *words: object) -> int:
    return curves.main(["--miniature", str(miniature), "--runs", str(runs), *map(str, words)])


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(curves, "in_processes", lambda jobs: pytest.fail("trains"))


def test_finished_runs_become_a_table_and_a_picture(miniature, tmp_path, no_training, capsys):
    runs = finished(tmp_path / "runs", light2=metrics(40, "0.25"))
    assert called(miniature, runs, "--steps", 40) == 0
    assert "| light | 2 | 0.2500 | 0.2500 | 0.2500 | 0.2500 |" in capsys.readouterr().out
    assert (runs / "optimizers.png").stat().st_size > 1000


WRONG = {
    "empty": "", "half": metrics(40)[:-9], "one": metrics(38) + "1\n", "no step": metrics(38) + '{"val_loss": 0.5}\n',
    "null": metrics(40, "null"), "NaN": metrics(40, "NaN"), "zero": metrics(40, "0.0"), "text": metrics(40, '"a"'),
    "list": "[]\n", "nested": "[" * 9000, "no text": "\0", "shorter": metrics(38), "longer": metrics(42),
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("run", ["adamw0", "light1"])
def test_a_finished_run_without_its_losses_is_named(run, text, miniature, tmp_path, no_training, capsys):
    runs = finished(tmp_path / "runs", **{run: text})
    assert called(miniature, runs, "--steps", 40) == 2
    folder = runs / f"{run[:-1]}-{run[-1]}"
    said = capsys.readouterr().err
    assert said.startswith(f"error: {folder / 'metrics.jsonl'}: ") and f"delete {folder}" in said
    assert said.count("\n") == 1 and folder.exists()


def test_a_finished_run_of_other_steps_is_no_part_of_the_table(miniature, tmp_path, no_training, capsys):
    runs = finished(tmp_path / "runs")
    for steps in (20, 38, 60, 400):
        assert called(miniature, runs, "--steps", steps) == 2
        assert f"has not the validation losses of a run of {steps} steps" in capsys.readouterr().err
    (runs / "light-1/metrics.jsonl").unlink()
    assert called(miniature, runs, "--steps", 40) == 2 and "light-1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--picture", "p.xyz"], "--picture p.xyz: no kind of picture"),
        (["--picture", "p"], "--picture p: no kind of picture"),
        (["--picture", "nowhere/p.png"], "--picture nowhere/p.png: cannot be written"),
        (["--picture", "folder.png"], "--picture folder.png: cannot be written"),
        (["--runs", "file"], "cannot be written"),
        (["--steps", "0"], "--steps is 0: it must be above 0"),
        (["--steps", "-5"], "--steps is -5: it must be above 0"),
        (["--lr", "nan"], "--lr is nan: it must be above 0"),
        (["--lr", "-1"], "--lr is -1.0: it must be above 0"),
    ],
)
def test_bad_words_are_one_line_before_anything_is_trained(words, told, miniature, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(curves, "in_processes", lambda jobs: pytest.fail("trains"))
    Path("folder.png").mkdir()
    Path("file").touch()
    assert called(miniature, tmp_path / "runs", *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and told in said and said.count("\n") == 1


@pytest.mark.parametrize("part", curves.PARTS)
def test_a_miniature_that_lacks_a_part_is_one_line(part, miniature, tmp_path, no_training, capsys):
    shutil.copytree(miniature, tmp_path / "mini")
    shutil.rmtree(tmp_path / "mini" / part) if part.endswith("images") else (tmp_path / "mini" / part).unlink()
    assert called(tmp_path / "mini", tmp_path / "runs") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --miniature {tmp_path / 'mini'}: has no {part}") and said.count("\n") == 1


def test_records_whose_images_are_gone_are_said(miniature, tmp_path):
    shutil.copytree(miniature, tmp_path / "mini")
    (tmp_path / "mini/world/images/b.png").unlink()
    with pytest.raises(curves.Error, match=r"instruct\.json: records that are bad, or lose something: 1 \(b\)"):
        curves.stage2(tmp_path / "mini", tmp_path / "run", "adamw", 0, 4, 1e-3)


def test_ctrl_c_is_answered_once(miniature, tmp_path, monkeypatch, capsys):
    def interrupted(jobs: dict) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(curves, "in_processes", interrupted)
    assert called(miniature, tmp_path / "runs") == 130
    assert capsys.readouterr().err == "\ninterrupted: go on with the same command\n"


def losses(folder: Path) -> list[tuple]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(entry["loss"], entry.get("val_loss"), entry["grad_norm"]) for entry in entries]
