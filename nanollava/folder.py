"""The files of a checkpoint folder: JSON, tensors whole or in shards, and the replacement of a folder in one step.

Nothing here knows what the tensors mean; that is checkpoint.py. They are read with safetensors or, from official .bin
files, with torch.load(weights_only=True), which builds tensors and runs no code.
"""

import json
import os
import shutil
import tempfile
import zipfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanollava.error import Error, first_line, some

# what belongs to a checkpoint, so that nothing of it outlives its replacement
OWN = ("*.safetensors", "*.bin", "*.pt", "*.index.json", "tokenizer*", "added_tokens.json", "special_tokens_map.json",
       "adapter_config.json")  # fmt: skip
AT_ONCE = 2**28  # bytes of a file of weights that are read before it is opened anew
LFS_POINTER = b"version https://git-lfs"  # how a file begins that git cloned without its contents


# ---------------------------------------------------------------- reading


def read_json(file: Path, missing: str = "a checkpoint folder needs it, is the download complete?") -> dict:
    """The object in a JSON file. Raises Error where it is missing (``missing`` says what for), broken or no object."""
    if not file.parent.is_dir():
        raise Error(f"{file.parent}: no such folder; check the path")
    if not file.is_file():
        raise Error(f"{file}: no such file; {missing}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise Error(f"{file}: may not be read here; mend its permissions") from error
    except (OSError, ValueError, RecursionError) as error:
        raise Error(f"{file}: cannot be read as JSON ({first_line(error)}); download or write it again") from error
    if not isinstance(content, dict):
        raise Error(f"{file}: holds a {type(content).__name__}, expected an object {{...}}")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The one file of weights in a folder, or its shards; a file is its own. Raises Error where there are none, or a
    shard is missing."""
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise Error(f"{folder}: no such folder; check the path")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return _shards(folder / f"{name}.index.json")
    raise Error(
        f"{folder}: no weights in it: expected model.safetensors or pytorch_model.bin, whole or in shards with their "
        "index; is the download complete?"
    )


def _shards(index: Path) -> list[Path]:
    """The files that an index names, in order."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise Error(f'{index}: the field "weight_map" must map each tensor to its file; download it again')
    files = [index.parent / name for name in sorted(set(names.values()))]
    if outside := [file for file in files if file.parent != index.parent or file.name in ("", "..")]:
        raise Error(f"{index}: names a file outside its folder, {outside[0]}; refused")
    if missing := [file.name for file in files if not file.is_file()]:
        raise Error(f"{index}: {some(missing)} of {len(files)} shards missing; download the rest")
    return files


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor in a file, without reading the tensors."""
    with _opened(file) as tensors:
        if isinstance(tensors, dict):
            return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and contents of each tensor in a file, one at a time. They live in its pages, mapped for this process alone:
    writing to them does not write to the file.

    The file is opened anew after every AT_ONCE bytes: until it is closed, what was read of it counts as memory in use.
    """
    names, mapped = None, file.suffix != ".bin" or _can_map(file)  # what is not has to be read whole
    while names is None or names:
        with _opened(file) as stored:
            names, read = deque(stored.keys()) if names is None else names, 0
            while names and (read < AT_ONCE or not mapped):
                name = names.popleft()
                tensor = stored[name] if isinstance(stored, dict) else stored.get_tensor(name)
                read += tensor.nbytes
                yield name, tensor


@contextmanager
def _opened(file: Path):
    """A file of tensors: a dictionary for .bin, a safetensors handle otherwise. Whatever is wrong with it: Error."""
    try:
        with file.open("rb") as raw:
            start = raw.read(len(LFS_POINTER))
        if not start:
            raise Error(f"{file}: an empty file (0 bytes); download it again")
        if start == LFS_POINTER:
            raise Error(f"{file}: a git-lfs pointer, not the weights themselves; run git lfs pull or download the file")
        if file.suffix == ".bin":
            yield _load_bin(file)
        else:
            with safe_open(file, framework="pt") as handle:
                yield handle
    except PermissionError as error:
        raise Error(f"{file}: may not be read here; mend its permissions") from error
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise Error(f"{file}: damaged or incomplete ({first_line(error)}); download it again") from error


def _load_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by torch.save; memory-mapped where possible, so that only what is used is read."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=_can_map(file))
    except PermissionError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way, and torch's words advise to load it unsafely
        raise Error(f"{file}: damaged, or no file of weights ({type(error).__name__}); download it again") from error
    good = isinstance(content, dict) and all(isinstance(x, Tensor) and isinstance(k, str) for k, x in content.items())
    if not good:
        raise Error(f"{file}: expected a dictionary of tensors; is it a file of weights?")
    if odd := [name for name, x in content.items() if x.layout != torch.strided or x.is_quantized or x.is_meta]:
        raise Error(f"{file}: {some(odd)} tensors are quantised, sparse or without numbers; give plain ones")
    return content


def _can_map(file: Path) -> bool:
    """Whether the tensors stand in a .bin as in memory: not in files from before 2020, which are no zip archives, nor
    in archives that somebody compressed."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


# ---------------------------------------------------------------- writing


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A new folder to write into; when the block ends well it becomes `path`, in place of the folder there before.

        with atomic_folder("runs/stage1/checkpoint") as folder:
            ...  # write all files into `folder`

    The new folder is `.NAME.saving` beside `path`, flushed to the disk before it gets its name; the old one steps aside
    as `.NAME.previous` and is deleted last. So a kill or a full disk at any moment leaves a whole one: `path`, or, when
    it came between the two renames, both hidden ones. `last_good` finds it, the next `atomic_folder` puts it in place.
    Files of others than a checkpoint's that were in the old folder are in the new one too.
    Raises Error where the disk is full or refuses, and where `path` holds something that is no checkpoint.
    """
    path = Path(path).resolve()
    new, old = siblings(path)
    check_replaceable(path)
    try:
        _repair(path)
        new.mkdir(parents=True)
        yield new
        if path.exists():
            _carry_over(path, new)
        _flush(new)
        if path.exists():
            path.rename(old)
        new.rename(path)
        _flush_directory(path.parent)
    except Error as error:
        raise Error(f"{path}: not saved, {error}") from error
    except Exception as error:
        if not _from_the_disk(error):
            raise
        intact = "what stood there is intact: " if path.exists() else ""
        remedy = f"{intact}free some space or choose another folder"
        raise Error(f"{path}: cannot be saved ({first_line(error)}); {remedy}") from error
    finally:
        _repair(path)


def last_good(path: str | Path) -> Path:
    """Where the folder that `atomic_folder(path)` last completed is: nearly always `path` itself. Changes nothing."""
    new, old = siblings(Path(path).resolve())
    if Path(path).exists() or not old.exists():
        return Path(path)
    return new if new.exists() else old


def check_writable(path: Path) -> None:
    """Raises Error where no folder ``path`` could be made. Leaves nothing behind but its parents."""
    parent = path.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=parent).close()
        siblings(path.resolve())[1].exists()  # fails where the longest name that saving uses is too long
        is_file = path.exists() and not path.is_dir()
        is_fixed = os.path.ismount(path) or Path.cwd().is_relative_to(path.resolve())
    except (OSError, ValueError) as error:
        raise Error(f"{path}: cannot be written ({first_line(error)}); choose another folder") from error
    if is_file:
        raise Error(f"{path}: is a file; choose another name for the folder")
    if is_fixed:
        problem = "saving replaces the folder, and in this one you are, or a disk is mounted"
        raise Error(f"{path}: {problem}; choose a folder inside it")


def siblings(path: Path) -> tuple[Path, Path]:
    """What a folder is called while it is written, and while it is being replaced."""
    if not path.name:
        raise Error(f"{path}: is the root of the disk; choose a folder below it")
    return path.with_name(f".{path.name}.saving"), path.with_name(f".{path.name}.previous")


def _repair(path: Path) -> None:
    """Finish or undo what an interrupted save left: a missing folder gets its place back, leftovers go."""
    new, old = siblings(path)
    if not path.exists() and old.exists():  # stopped between the renames: the new one was already whole
        last_good(path).rename(path)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)


def check_replaceable(path: Path) -> None:
    """Saving replaces a folder whole, so it must be a checkpoint, empty, or not there."""
    if path.is_dir() and any(path.iterdir()) and not _is_checkpoint(path):
        raise Error(f"{path}: holds other files than a checkpoint, which saving would delete; choose another folder")
    if path.exists() and not path.is_dir():
        raise Error(f"{path}: is a file; choose another name for the folder")


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the config of a model."""
    try:
        return "model_type" in read_json(folder / "config.json")
    except Error:
        return False


def _carry_over(old: Path, new: Path) -> None:
    """Give the new folder what others than a checkpoint put into the old one: notes, results."""
    for item in old.iterdir():
        if any(map(item.match, OWN)) or (new / item.name).exists():
            continue
        if item.is_dir():
            shutil.copytree(item, new / item.name, symlinks=True, copy_function=link)
        else:
            link(item, new / item.name)


def link(file: str | Path, other: str | Path) -> None:
    """Another name for a file, so that no bytes are written; a copy where the disk has no such thing."""
    try:
        os.link(file, other)
    except OSError:
        shutil.copy2(file, other, follow_symlinks=False)


def _flush(folder: Path) -> None:
    """Have everything in a folder on the disk itself, not only in the system's memory, and readable as usual."""
    for item in sorted(folder.rglob("*")):
        if item.is_symlink():
            continue
        if item.is_file():
            if item.suffix == ".safetensors":  # save_file makes them readable to their owner alone
                item.chmod(folder.stat().st_mode & 0o666)
            with item.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _flush_directory(item)
    _flush_directory(folder)


def _flush_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _from_the_disk(error: Exception) -> bool:
    """Whether writing failed: Python, safetensors and torch.save each have their own way of saying so."""
    return isinstance(error, OSError | SafetensorError) or "inline_container" in str(error)
