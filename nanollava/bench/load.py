"""Loading a folder until all its weights can be computed with, in a process of its own: seconds, and the most memory
that the process held.

    python -m nanollava.bench.load ours|theirs FOLDER DEVICE DTYPE

prints one JSON object.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import nanollava
from nanollava.bench import reference
from nanollava.error import Error
from nanollava.folder import weight_files
from nanollava.train.machine import memory_in_use, peak_memory


def in_new_process(who: str, folder: Path, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """{"seconds", "peak" (bytes above what the process held before)} of one load. Raises Error where it fails."""
    command = [sys.executable, "-m", __spec__.name, who, str(folder), str(device), str(dtype).removeprefix("torch.")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}, out of memory?"]
        raise Error(f"loading {folder} ({who}): {lines[-1].removeprefix('nanollava.error.Error: ')}")
    return json.loads(done.stdout.splitlines()[-1])


def main(who: str, folder: str, device: str, dtype: str) -> None:
    """Do it, and tell."""
    work = prepared(who, Path(folder), torch.device(device), getattr(torch, dtype))
    before = memory_in_use(torch.device("cpu"))
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of what was imported is forgotten
    began = time.perf_counter()
    kept = work()
    for tensor in kept.parameters():  # one number of each page: a mapped file has not been read before
        tensor.detach().flatten()[:: 4096 // tensor.itemsize].sum()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak": peak() - before * 1e9}))
    del kept


def peak() -> float:
    """The most that this process held, in bytes: pages of mapped files count. What getrusage tells on Linux may be its
    parent's."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    told = [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return told[0] if told else peak_memory(torch.device("cpu")) * 1e9


def prepared(who: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Callable[[], nn.Module]:
    """The work, with all imported that it needs."""
    if who == "ours":
        return lambda: nanollava.load(folder, device, dtype)
    from transformers import LlavaForConditionalGeneration  # noqa: F401  an import is no loading

    return lambda: reference.load(folder, device, dtype)


def read_rate(folder: Path) -> float:
    """GB a second of reading the same files and keeping nothing."""
    buffer, size, began = bytearray(2**24), 0, time.perf_counter()
    for file in weight_files(folder):
        with file.open("rb", buffering=0) as raw:
            while count := raw.readinto(buffer):
                size += count
    return size / 1e9 / (time.perf_counter() - began)


if __name__ == "__main__":
    main(*sys.argv[1:])
