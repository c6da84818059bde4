"""Replacing a folder in one step, whatever interrupts it; reading tensors whole, in shards, and damaged."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nanollava.error import Error
from nanollava.folder import atomic_folder, check_writable, last_good, read_json, shapes, tensors, weight_files

ROOT = Path(__file__).parent.parent


def save(path: Path, content: str) -> None:
    with atomic_folder(path) as new:
        (new / "config.json").write_text(json.dumps({"model_type": "llava", "content": content}))
        (new / "inner").mkdir()
        (new / "inner" / "state").write_text(content)


def content(path: Path) -> str:
    """What the folder holds now, both its files agreeing."""
    good = last_good(path)
    found = json.loads((good / "config.json").read_text())["content"]
    assert found == (good / "inner" / "state").read_text()
    return found


def test_a_new_folder_and_its_replacement_leave_nothing_behind(tmp_path):
    path = tmp_path / "deep" / "run"
    for text in ("first", "second", "third"):
        save(path, text)
        assert content(path) == text and last_good(path) == path
        assert os.listdir(path.parent) == ["run"]


def test_weights_may_be_read_by_whoever_may_read_the_folder(tmp_path):
    with atomic_folder(tmp_path / "run") as new:
        save_file({"x": torch.ones(1)}, new / "model.safetensors")
    folder, file = (path.stat().st_mode & 0o777 for path in (tmp_path / "run", tmp_path / "run/model.safetensors"))
    assert file == folder & 0o666


def test_what_others_put_into_the_folder_stays_and_what_belongs_to_the_old_checkpoint_goes(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError

    save(tmp_path / "run", "first")
    for name in ("notes.txt", ".git/HEAD", "model-00001-of-00002.safetensors", "training.pt", "added_tokens.json"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text(name)
    (tmp_path / "run" / "dangling").symlink_to("nowhere")
    for text in ("second", "third"):
        save(tmp_path / "run", text)
        assert sorted(os.listdir(tmp_path / "run")) == [".git", "config.json", "dangling", "inner", "notes.txt"]
        assert (tmp_path / "run/notes.txt").read_text() == "notes.txt" and content(tmp_path / "run") == text
        assert (tmp_path / "run/.git/HEAD").read_text() == ".git/HEAD"
        monkeypatch.setattr(os, "link", no_links)  # the second time on a disk that has none


def test_a_config_that_is_no_model_s_makes_no_checkpoint(tmp_path):
    (tmp_path / "app").mkdir()
    for text in ('{"name": "my web app"}', "{", "[]"):
        (tmp_path / "app" / "config.json").write_text(text)
        with pytest.raises(Error, match="holds other files than a checkpoint"):
            save(tmp_path / "app", "new")
        assert (tmp_path / "app" / "config.json").read_text() == text


def test_a_link_is_followed(tmp_path):
    save(tmp_path / "real", "first")
    (tmp_path / "latest").symlink_to("real")
    save(tmp_path / "latest", "second")
    assert (tmp_path / "latest").is_symlink() and content(tmp_path / "real") == "second"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("a bug"), KeyboardInterrupt()])
def test_an_error_while_writing_keeps_the_old_one(tmp_path, error):
    save(tmp_path / "run", "good")
    kind = Error if isinstance(error, OSError) else type(error)
    with pytest.raises(kind) as caught, atomic_folder(tmp_path / "run") as new:
        (new / "config.json").write_text("half")
        raise error
    assert content(tmp_path / "run") == "good" and os.listdir(tmp_path) == ["run"]
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value) and "intact" in str(caught.value)


WRITERS = {
    "safetensors": lambda file: save_file({"x": torch.ones(9999)}, file),
    "torch": lambda file: torch.save(torch.ones(9999), file),
    "plain": lambda file: file.write_bytes(b"x" * 40_000),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_one_line_whoever_writes(tmp_path, write):
    save(tmp_path / "run", "good")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as a disk with room for 20 kB
    try:
        with pytest.raises(Error, match="cannot be saved") as caught, atomic_folder(tmp_path / "run") as new:
            write(new / "large.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert content(tmp_path / "run") == "good" and os.listdir(tmp_path) == ["run"]


# Saves in forked children, the n-th of which dies before its n-th step on the disk; prints what became of each.
KILLED = """
import os, sys
from pathlib import Path
import nanollava.folder as folder
sys.path.insert(0, {tests!r})
from test_folder import save

def die_before_step(step):
    done = []
    def killing(real):
        def instead(*args, **kwargs):
            done.append(real)
            if len(done) > step:
                os._exit(9)  # as kill -9: nothing is cleaned up
            return real(*args, **kwargs)
        return instead
    steps = (Path, "mkdir"), (Path, "write_text"), (Path, "rename"), (folder, "_flush"), (folder.shutil, "rmtree")
    for owner, name in steps:
        setattr(owner, name, killing(getattr(owner, name)))

for step in range(100):
    path = Path({path!r}) / str(step) / "run"
    save(path, "old")
    child = os.fork()
    if child == 0:
        die_before_step(step)
        save(path, "new")
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_a_kill_at_any_moment_leaves_a_whole_folder(tmp_path):
    program = KILLED.format(tests=str(ROOT / "tests"), path=str(tmp_path))
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    left = []
    for parent in tmp_path.iterdir():
        left.append((content(parent / "run"), (parent / "run").exists()))
        save(parent / "run", "next")  # repairs what the kill left
        assert content(parent / "run") == "next" and os.listdir(parent) == ["run"]
    assert len(left) > 8 and {state for state, _ in left} == {"old", "new"}
    assert ("new", False) in left  # the kill between the renames


def test_last_good_of_nothing_and_of_a_lone_previous(tmp_path):
    assert last_good(tmp_path / "run") == tmp_path / "run"
    save(tmp_path / "run", "good")
    (tmp_path / "run").rename(tmp_path / ".run.previous")
    assert content(tmp_path / "run") == "good"
    save(tmp_path / "run", "next")
    assert content(tmp_path / "run") == "next" and os.listdir(tmp_path) == ["run"]


def test_other_peoples_files_are_never_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("dear to someone")
    (tmp_path / "file").write_text("x")
    for name, match in (("photos", "other files"), ("file", "is a file"), ("file/below", "cannot be saved")):
        with pytest.raises(Error, match=match):
            save(tmp_path / name, "x")
    assert (tmp_path / "photos" / "a.jpg").exists() and sorted(os.listdir(tmp_path)) == ["file", "photos"]


# ---------------------------------------------------------------- reading

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b.c": torch.tensor(2.5), "d": torch.zeros(0, 4)}


def write_shards(folder: Path, ending: str) -> None:
    kind = "model" if ending == "safetensors" else "pytorch_model"
    names = {name: f"{kind}-{i + 1:05}-of-00003.{ending}" for i, name in enumerate(WEIGHTS)}
    for name, file in names.items():
        write = save_file if ending == "safetensors" else torch.save
        write({name: WEIGHTS[name]}, folder / file)
    index = {"metadata": {"total_size": 28}, "weight_map": names}
    (folder / f"{kind}.{ending}.index.json").write_text(json.dumps(index))


def read(folder: Path) -> dict:
    return {name: tensor.clone() for file in weight_files(folder) for name, tensor in tensors(file)}


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("at_once", [1, 2**28])
def test_every_kind_of_file_gives_the_same(tmp_path, monkeypatch, ending, sharded, at_once):
    monkeypatch.setattr("nanollava.folder.AT_ONCE", at_once)
    if sharded:
        write_shards(tmp_path, ending)
    elif ending == "bin":
        torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")
    else:
        save_file(WEIGHTS, tmp_path / "model.safetensors")
    found = read(tmp_path)
    assert found.keys() == WEIGHTS.keys() and all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)
    known = {name: shape for file in weight_files(tmp_path) for name, shape in shapes(file).items()}
    assert known == {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_damaged_files_are_one_line_that_names_them(tmp_path, ending):
    write_shards(tmp_path, ending)
    file = weight_files(tmp_path)[0]
    whole = file.read_bytes()
    damages = {
        b"": "0 bytes",
        whole[:-5]: "damaged",
        whole[:20]: "damaged",
        b"x" * 300: "damaged",
        b"version https://git-lfs.github.com/spec/v1\noid": "git lfs pull",
    }
    for damage, match in damages.items():
        file.write_bytes(damage)
        for attempt in (read, lambda folder: shapes(weight_files(folder)[0])):
            with pytest.raises(Error, match=match) as caught:
                attempt(tmp_path)
            assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(Error, match=rf"1 \({file.name}\) of 3 shards missing"):
        read(tmp_path)


def test_a_bin_file_from_before_the_zip_format_is_read(tmp_path):
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = read(tmp_path)
    assert found.keys() == WEIGHTS.keys() and all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


def test_a_bin_file_runs_no_code_and_holds_only_tensors(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was here"),)

    for content in ({"a": Evil()}, [torch.ones(2)], {"a": 3}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(Error, match=r"pytorch_model\.bin"):
            read(tmp_path)
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize("text", [b"Repository not found", b"hello world", b"\x80\x02}q.", b"Not Found", b"\0" * 99])
def test_what_is_no_file_of_weights_is_one_line_without_advice_to_load_it_unsafely(text, tmp_path):
    """What failed downloads leave."""
    (tmp_path / "pytorch_model.bin").write_bytes(text)
    with pytest.raises(Error, match=r"pytorch_model\.bin: (damaged, or no file of weights|expected a dict)") as caught:
        read(tmp_path)
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_dictionary_without_names_is_no_file_of_weights(tmp_path):
    torch.save({1: torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Error, match="expected a dictionary of tensors"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_file_that_may_not_be_read_is_not_to_be_fetched_again(name, tmp_path, monkeypatch):
    (tmp_path / name).write_text("{}")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(Error, match="mend its permissions"):
        read_json(tmp_path / name) if name == "config.json" else read(tmp_path)


def test_no_weights_bad_index_and_bad_json(tmp_path):
    with pytest.raises(Error, match="no weights"):
        weight_files(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text, match in (
        ("{}", "weight_map"),
        ('{"weight_map": {"a": 3}}', "weight_map"),
        ("{", "JSON"),
        ('{"weight_map": {"a": "../b"}}', "outside"),
        ("[]", "expected an object"),
        ('{"a":' * 100_000, "JSON"),
    ):
        index.write_text(text)
        with pytest.raises(Error, match=match):
            weight_files(tmp_path)
    with pytest.raises(Error, match="no such folder"):
        read_json(tmp_path / "nothing" / "config.json")
    with pytest.raises(Error, match="no such file"):
        read_json(tmp_path / "config.json")


def test_the_root_of_the_disk_is_no_folder_for_a_checkpoint():
    with pytest.raises(Error, match="root of the disk"):
        last_good("/")


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_done(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / ("x" * 300)):
        with pytest.raises(Error, match="choose another"):
            check_writable(path)
    check_writable(tmp_path / "new" / "folder")
    with pytest.raises(Error, match="cannot be written"):  # the name itself would do, the one it is saved under not
        check_writable(tmp_path / ("x" * 250))
    assert (tmp_path / "file").read_text() == "mine" and not list((tmp_path / "new").iterdir())


def test_the_folder_one_is_in_and_a_mounted_disk_cannot_be_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "inner").mkdir(parents=True)
    for path in (Path("."), tmp_path, tmp_path.parent, Path("run/..")):
        with pytest.raises(Error, match="choose a folder inside it"):
            check_writable(path)
    check_writable(Path("run"))
    monkeypatch.setattr(os.path, "ismount", lambda path: path == Path("run"))
    with pytest.raises(Error, match="choose a folder inside it"):
        check_writable(Path("run"))
