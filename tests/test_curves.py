"""Curves of two optimizers beside each other: the runs are train.py's, the table and the picture show what is there."""

import json
from pathlib import Path

import pytest

from nanollava.train import curves

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


@pytest.mark.parametrize("optimizer", ["adamw", "light"])
def test_a_run_is_the_one_that_train_py_makes(optimizer, trainer, tmp_path):
    world = tmp_path / "world"
    world.mkdir()
    (world / "images").symlink_to(trainer.images)
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A small red star."}]
    records = [{"id": name, "image": f"{name}.png", "conversations": turns} for name in "abcd"]
    for name in ("captions", "instruct", "instruct_val"):
        (world / f"{name}.json").write_text(json.dumps(records))
    assert trainer.stage(1, world / "captions.json", tmp_path / "stage1", "--steps", 1) == 0
    words = ("--share-images", "--batch-size", 2, "--lr", 1e-2, "--seed", 2, "--steps", 4, "--val-every", 1)
    data = ("--model", tmp_path / "stage1", "--val", world / "instruct_val.json", "--optimizer", optimizer)
    assert trainer.stage(2, world / "instruct.json", tmp_path / "typed", *data, *words) == 0
    curves.stage2(tmp_path, tmp_path / "run", optimizer, seed=2, steps=4, lr=1e-2, batch_size=2)
    assert losses(tmp_path / "run") == losses(tmp_path / "typed") and len(curves.read_curve(tmp_path / "run")) == 4


def losses(folder: Path) -> list[tuple]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(entry["loss"], entry["val_loss"], entry["grad_norm"]) for entry in entries]
