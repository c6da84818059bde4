"""Patch features kept on disk: the losses are those of a run without, the tower sees each image once, and nothing that
is damaged, out of date or another tower's is ever read."""

import errno
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from nanollava.checkpoint import load, save_vision
from nanollava.images import preprocess
from nanollava.llava import Llava, LlavaConfig
from nanollava.train import loop
from nanollava.train.features import FeatureCache
from nanollava.vit import VisionConfig, VisionTransformer

VISION = VisionConfig(16, 8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)


def record(name: str, image: str | list[str] | None, *turns: str) -> dict:
    """An official record: human and gpt in turn."""
    conversations = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": name, **({"image": image} if image else {}), "conversations": conversations}


TALKS = [
    record("a1", "a.png", "<image>\nWhat color is the ball?", "The ball is blue."),
    record("t1", None, "What is a square?", "It has four sides."),
    record("a2", "a.png", "<image>\nWhat color is the star?", "Red."),
    record("b1", "b.png", "What is this?\n<image>", "A star.", "<image> And its size?", "It is small."),
    record("bc", ["b.png", "c.png"], "<image> <image>: the same?", "No."),
    record("d1", "d.png", "<image>\nWhat?", "A ball."),
]
RUN = ("--batch-size", 3, "--epochs", 3, "--lr", 1e-2, "--log-every", 1)  # two steps an epoch


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "records.json"
    file.write_text(json.dumps(TALKS))
    return file


@pytest.fixture(autouse=True)
def tower_alone(monkeypatch) -> None:
    """Without a cache, too, the tower has one image at a time: a matrix product of more rows may round otherwise."""
    hidden_state = VisionTransformer.hidden_state
    apart = lambda self, pixels, layer: torch.cat([hidden_state(self, p[None], layer) for p in pixels])  # noqa: E731
    monkeypatch.setattr(VisionTransformer, "hidden_state", apart)


@pytest.fixture
def seen(monkeypatch, tower_alone) -> list[int]:
    """How many images each call of the tower has had since."""
    calls, hidden_state = [], VisionTransformer.hidden_state

    def count(self, pixels, layer):
        calls.append(len(pixels))
        return hidden_state(self, pixels, layer)

    monkeypatch.setattr(VisionTransformer, "hidden_state", count)
    return calls


def losses(out: Path) -> list[tuple]:
    entries = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [tuple(entry.get(name) for name in ("step", "loss", "grad_norm", "val_loss")) for entry in entries]


def same_result(a: Path, b: Path) -> bool:
    """Whether two runs gave the same losses and weights, bit for bit; those of the tower among them."""
    mine, theirs = load(a).state_dict(), load(b).state_dict()
    return losses(a) == losses(b) and all(torch.equal(mine[name], theirs[name]) for name in theirs)


def cache(folder: Path, seed: int = 0, **settings: str) -> tuple[FeatureCache, Llava]:
    with torch.device("meta"):  # nothing but the tower is asked for
        model = Llava(LlavaConfig(VISION, **settings))
    torch.manual_seed(seed)
    model.vision = VisionTransformer(VISION)
    return FeatureCache(folder, model), model


@pytest.fixture
def picture(trainer, tmp_path) -> Path:
    file = tmp_path / "picture.png"
    file.write_bytes((trainer.images / "a.png").read_bytes())
    return file


def never() -> None:
    raise AssertionError("the picture is opened although its features are there")


# ---------------------------------------------------------------- in training


@pytest.mark.parametrize("words", [(), ("--share-images",), ("--rows-at-once", 1, "--max-length", 150)], ids=str)
def test_losses_are_those_of_a_run_without_bit_for_bit_and_the_tower_sees_each_image_once(
    words, trainer, data, tmp_path, seen, capsys
):
    kept, words = tmp_path / "kept", (*RUN, "--val", data, "--val-every", 2, *words)
    assert trainer.stage(2, data, tmp_path / "without", *words) == 0
    without, seen[:] = sum(seen), []
    assert trainer.stage(2, data, tmp_path / "with", *words, "--cache-features", kept) == 0
    assert without > 20 and seen == [1] * 4
    assert same_result(tmp_path / "with", tmp_path / "without")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "patch features are kept" in line]
    assert line.startswith(f"{kept}/") and "MB for each image" in line
    seen.clear()
    assert trainer.stage(2, data, tmp_path / "again", *words, "--cache-features", kept) == 0
    assert seen == [] and same_result(tmp_path / "again", tmp_path / "without")


def test_losses_are_close_to_those_of_a_run_whose_tower_has_all_images_at_once(trainer, data, tmp_path, monkeypatch):
    monkeypatch.undo()
    assert trainer.stage(2, data, tmp_path / "without", *RUN) == 0
    assert trainer.stage(2, data, tmp_path / "with", *RUN, "--cache-features", tmp_path / "kept") == 0
    a, b = ([loss for _, loss, *_ in losses(tmp_path / name)] for name in ("with", "without"))
    assert a == pytest.approx(b, rel=1e-5) and len(a) == 6


def test_stage_1_and_whitening_take_them_too(trainer, data, tmp_path, seen):
    words = ("--whiten", "--steps", 4, "--batch-size", 2, "--projector", "mlp2x_gelu")
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps([record(n, f"{n}.png", "<image>", f"A {n} ball.") for n in "abcd"]))
    assert trainer.stage(1, captions, tmp_path / "without", *words) == 0
    seen.clear()
    assert trainer.stage(1, captions, tmp_path / "with", *words, "--cache-features", tmp_path / "kept") == 0
    assert seen == [1] * 4 and same_result(tmp_path / "with", tmp_path / "without")


def test_a_cut_run_goes_on_with_or_without_them(trainer, data, tmp_path, monkeypatch):
    report, kept = loop.Run.report, ("--cache-features", tmp_path / "kept")
    assert trainer.stage(2, data, tmp_path / "whole", *RUN) == 0

    def interrupted(self, *rest):
        if self.step == 4:
            raise KeyboardInterrupt
        report(self, *rest)

    for name, first, then in (("a", kept, ()), ("b", (), kept), ("c", kept, kept)):
        with monkeypatch.context() as patch:
            patch.setattr(loop.Run, "report", interrupted)
            assert trainer.stage(2, data, tmp_path / name, *RUN, "--save-every", 2, *first) == 130
        assert trainer.stage(2, data, tmp_path / name, *RUN, "--save-every", 2, *then, "--resume") == 0
        assert same_result(tmp_path / name, tmp_path / "whole")


def test_a_resumed_run_has_its_own_tower_whatever_the_command_names(trainer, data, tmp_path, monkeypatch):
    torch.manual_seed(9)
    save_vision(VisionTransformer(VISION), tmp_path / "other")
    report, words = loop.Run.report, (*RUN, "--save-every", 2)
    assert trainer.stage(2, data, tmp_path / "whole", *words) == 0

    def interrupted(self, *rest):
        if self.step == 4:
            raise KeyboardInterrupt
        report(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "report", interrupted)
        assert trainer.stage(2, data, tmp_path / "out", *words) == 130
    kept = ("--cache-features", tmp_path / "kept", "--resume")
    assert trainer.stage(2, data, tmp_path / "out", *words, *kept, "--vision", tmp_path / "other") == 0
    assert same_result(tmp_path / "out", tmp_path / "whole")


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_on_a_full_disk_training_goes_on_with_one_line(trainer, data, tmp_path, monkeypatch, capsys, seen):
    assert trainer.stage(2, data, tmp_path / "without", *RUN) == 0
    write_bytes, kept = Path.write_bytes, tmp_path / "kept"

    def fills_up(self, content):
        if kept in self.parents and next(writes) >= 2:  # counted at once: several workers write
            write_bytes(self, content[:50])
            full_disk()
        return write_bytes(self, content)

    writes = itertools.count()
    monkeypatch.setattr(Path, "write_bytes", fills_up)
    seen.clear()
    assert trainer.stage(2, data, tmp_path / "with", *RUN, "--cache-features", kept) == 0
    assert same_result(tmp_path / "with", tmp_path / "without")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line]
    assert str(kept) in line and "training goes on" in line
    files = [file for file in kept.rglob("*") if file.is_file()]
    assert len(files) == 2 and not any("." in file.name for file in files)
    assert len(seen) > 4


def test_a_damaged_picture_is_skipped_as_ever(trainer, data, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for name in "abcd":
        content = (trainer.images / f"{name}.png").read_bytes()
        (images / f"{name}.png").write_bytes(content[: len(content) // 2] if name == "d" else content)
    for out, words in (("without", ()), ("with", ("--cache-features", tmp_path / "kept"))):
        assert trainer.stage(2, data, tmp_path / out, *RUN, "--images", images, *words) == 0
        printed = capsys.readouterr()
        assert [line[:8] for line in printed.err.splitlines()] == ["skipped:"] and "1 records" in printed.out
    assert same_result(tmp_path / "with", tmp_path / "without")


def test_a_folder_that_cannot_be_is_one_line(trainer, data, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "kept"):
        assert trainer.stage(2, data, tmp_path / "out", *RUN, "--cache-features", folder) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"error: --cache-features {folder}: ") and "another folder" in line
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("inside", [(), ("kept",)], ids=str)
def test_a_folder_that_saving_replaces_is_refused_before_anything_is_made(inside, trainer, data, tmp_path, capsys):
    out = tmp_path / "out"
    kept = (tmp_path / ".." / tmp_path.name / "out").joinpath(*inside)
    assert trainer.stage(2, data, out, *RUN, "--cache-features", kept) == 2
    assert "choose a folder outside" in capsys.readouterr().err and os.listdir(tmp_path) == []
    assert trainer.stage(2, data, out, *RUN, "--cache-features", tmp_path / "out.kept") == 0


# ---------------------------------------------------------------- one picture


def test_features_are_those_of_the_tower_and_come_from_disk_the_second_time(picture, tmp_path):
    kept, model = cache(tmp_path / "kept")
    square = preprocess(Image.open(picture), 16)
    with torch.no_grad():
        expected = VisionTransformer.forward(model.vision, square[None])[0]
    assert torch.equal(kept.get(picture, lambda: square), expected)
    assert torch.equal(kept.get(picture, never), expected) and expected.shape == (4, 16)
    assert torch.equal(cache(tmp_path / "kept")[0].get(picture, never), expected)  # another process, later
    stacked = torch.stack([expected, expected])
    assert torch.equal(model.vision(stacked, -2), stacked)  # the model takes them as they are


def test_another_tower_another_square_or_a_changed_picture_has_others(picture, tmp_path):
    makes = [{"seed": 0}, {"seed": 1}, {"image_aspect_ratio": "pad"}, {"select_layer": -1}]
    found = [cache(tmp_path / "kept", **how)[0].get(picture, lambda: torch.ones(3, 16, 16)) for how in makes]
    assert len(os.listdir(tmp_path / "kept")) == 4 and not torch.equal(found[0], found[1])
    kept, _ = cache(tmp_path / "kept")
    assert torch.equal(kept.get(picture, never), found[0])
    times = os.stat(picture)
    os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns + 1_000_000))
    changed = kept.get(picture, lambda: torch.zeros(3, 16, 16))
    assert not torch.equal(changed, found[0]) and torch.equal(kept.get(picture, never), changed)
    with open(picture, "ab") as file:
        file.write(b"more")
    os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns + 1_000_000))
    assert torch.equal(kept.get(picture, lambda: torch.ones(3, 16, 16)), found[0])


def test_pictures_of_one_name_in_two_folders_are_two(picture, tmp_path, monkeypatch):
    kept, _ = cache(tmp_path / "kept")
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / picture.name
    twin.write_bytes(picture.read_bytes())
    os.utime(twin, ns=(0, os.stat(picture).st_mtime_ns))
    one = kept.get(picture, lambda: torch.ones(3, 16, 16))
    assert not torch.equal(kept.get(twin, lambda: torch.zeros(3, 16, 16)), one)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(kept.get(Path(picture.name), never), one)  # however it is named


@pytest.mark.parametrize("kind", ["read-only", "the tower's folder is a file", "a folder in it is a file"])
def test_what_cannot_be_written_or_removed_is_one_line_and_no_end(kind, picture, tmp_path, monkeypatch, capsys):
    kept, _ = cache(tmp_path / "kept")
    file = kept.folder if "tower" in kind else kept.entry(picture).parent
    if kind == "read-only":

        def refuse(*_, **__):
            raise OSError(30, "Read-only file system")

        for method in ("mkdir", "write_bytes", "unlink"):
            monkeypatch.setattr(Path, method, refuse)
    else:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    capsys.readouterr()
    found = [kept.get(picture, lambda: torch.ones(3, 16, 16)) for _ in range(2)]
    assert torch.equal(*found)
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written" in line and "training goes on" in line


DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-1],
    "one bit": lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
    "a bit of the checksum": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "longer": lambda content: content + b"\0",
    "garbage": lambda content: b"\xff" * 60,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_made_anew_with_a_line(damage, picture, tmp_path, capsys):
    kept, _ = cache(tmp_path / "kept")
    expected = kept.get(picture, lambda: torch.ones(3, 16, 16))
    (file,) = [file for file in (tmp_path / "kept").rglob("*") if file.is_file()]
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert torch.equal(kept.get(picture, lambda: torch.ones(3, 16, 16)), expected)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{file}: damaged") and file.read_bytes() == whole


def test_what_a_kill_leaves_behind_is_not_read(picture, tmp_path, monkeypatch, capsys):
    kept, _ = cache(tmp_path / "kept")
    write_bytes = Path.write_bytes

    def killed(self, content):
        write_bytes(self, content[:50])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_bytes", killed)
        kept.get(picture, lambda: torch.ones(3, 16, 16))
    assert len([file for file in (tmp_path / "kept").rglob("*") if file.is_file()]) == 1
    made = kept.get(picture, lambda: torch.ones(3, 16, 16))
    assert torch.equal(kept.get(picture, never), made) and capsys.readouterr().err == ""  # nor found damaged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_stay_as_they_were_in_the_dtype_of_the_tower(dtype, picture, tmp_path):
    with torch.device("meta"):
        model = Llava(LlavaConfig(VISION))
    model.vision = VisionTransformer(VISION).to(dtype)
    kept = FeatureCache(tmp_path / "kept", model)
    made = kept.get(picture, lambda: torch.ones(3, 16, 16))
    assert made.dtype == dtype and torch.equal(kept.get(picture, never), made)
    (file,) = [file for file in (tmp_path / "kept").rglob("*") if file.is_file()]
    assert file.stat().st_size == 4 * 16 * dtype.itemsize + 4
