"""What a run's folder has around it: a lock beside it while a run writes to it, and in it the checkpoints before the
last one."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nanollava.error import Error
from nanollava.folder import OWN, link, siblings
from nanollava.train.distributed import rank

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

BUSY = -1


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Raises Error where another run writes to ``out``. The system forgets the lock on `.NAME.lock` with its process,
    however that ends; where there are no such locks (Windows, some disks of a network) nothing is checked."""
    file = siblings(out.resolve())[0].with_suffix(".lock")
    handle = None if fcntl is None or rank() else locked(file)
    if handle == BUSY:
        raise Error(f"{out}: another run is writing to it; wait for its end, or choose another --out")
    try:
        yield
    finally:
        if handle is not None:
            file.unlink(missing_ok=True)
            os.close(handle)


def locked(file: Path) -> int | None:
    """A handle that holds the lock on a file; BUSY where another one has it, None where there are no locks."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except (OSError, ValueError):  # no place to save to either, which check_out will say
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        return BUSY if isinstance(error, BlockingIOError) else None
    if file.exists() and os.path.samestat(os.fstat(handle), file.stat()):
        return handle
    os.close(handle)  # who had it removed it meanwhile, and a new file of that name would be another lock
    return locked(file)


def keep_older(out: Path, new: Path, step: int, count: int) -> None:
    """Give the folder that is to replace ``out`` the checkpoint that is there now, as checkpoints/step-000500, beside
    the last of those kept before, ``count`` in all. No bytes are written: each file only gets one more name, and that
    in a folder not in use yet, so that it is all there as soon as that folder is, or nothing has changed."""
    if count == 0 or not out.is_dir():
        return  # what was kept by an earlier run stays as it is, like all that others put there
    before, kept, name = out / "checkpoints", new / "checkpoints", f"step-{step:06}"
    if os.path.lexists(before) and not before.is_dir():
        return print(f"{before}: no folder, so no older checkpoint is kept; move it away", flush=True)
    steps = {item.name for item in before.glob("*") if re.fullmatch(r"step-\d{6,}", item.name) and item.is_dir()}
    older = sorted(steps - {name}, key=lambda x: (len(x), x))
    surplus = {name, *older[: max(0, len(older) - count + 1)]}
    link_all((item for item in before.glob("*") if item.name not in surplus), kept)
    own = (file for file in out.iterdir() if any(map(file.match, OWN)) or (new / file.name).exists())
    link_all((file for file in own if file.is_file()), kept / name)


def link_all(items: Iterable[Path], folder: Path) -> None:
    """The same files, and folders of them, in another folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for item in items:
        if item.is_dir() and not item.is_symlink():
            link_all(item.iterdir(), folder / item.name)
        else:
            link(item, folder / item.name)
