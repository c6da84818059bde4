"""What training asks of the machine: its cores, its memory, its compiler, its name."""

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import platform
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from nanollava.error import Error
from nanollava.train.distributed import processes, rank


def peak_memory(device: torch.device) -> float:
    """Largest memory taken so far on a GPU, or by this process, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest * (1 if sys.platform == "darwin" else 1024) / 1e9


def memory_in_use(device: torch.device) -> float:
    """Memory taken now, on a GPU by tensors, otherwise by this process, in GB."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9
    statm = Path("/proc/self/statm")  # where there is none, the largest so far is the best that is known
    return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e9 if statm.exists() else peak_memory(device)


def check_bfloat16(device: str) -> None:
    """Raises Error for a GPU without the dtype that training computes in on CUDA: those before NVIDIA's Ampere."""
    if torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise Error(f"device {device}: {name} lacks bfloat16, in which training computes; take a newer one, or cpu")


def share_cores(count: int) -> ThreadPoolExecutor:
    """``count`` workers that share the cores: small matrices do not keep several cores busy, small models do. The
    thread that waits for them, and updates the weights afterwards, keeps all cores."""
    each = max(1, torch.get_num_threads() // count)
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(each,))


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C does not break into what runs inside: the function given says whether it was pressed. Twice does, but not
    among several processes: a launcher may pass on, at any time, what they have heard themselves."""
    pressed = []

    def note(*_: object) -> None:
        if pressed and processes() == 1:
            raise KeyboardInterrupt
        if not pressed and rank() == 0:
            twice = "; once more to stop at once" if processes() == 1 else ""
            print(f"\nCtrl-C: saving after this step{twice}", file=sys.stderr, flush=True)
        pressed.append(True)

    mine = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if mine else signal.SIG_IGN
    if before == signal.SIG_IGN:  # another thread, or a process whose parent answers
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        once_more = pressed and processes() > 1  # it must not break into the end of the run either
        signal.signal(signal.SIGINT, signal.SIG_IGN if once_more else before)


def keep_freed_memory() -> None:
    """glibc gives large freed blocks back to the system, and taking them anew, page by page, can cost more than the
    arithmetic of a small model: ask it to keep them."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: 32 MiB, the documented limit
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def processor() -> str:
    """The processor's name and the number of its cores."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    name = names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores ({name})"


def in_processes(jobs: dict[str, tuple[Callable, tuple]]) -> None:
    """Do independent jobs at the same time, each in a process with its share of the cores. Raises Error as soon as one
    fails, and ends the others."""
    context, threads = multiprocessing.get_context("spawn"), max(1, torch.get_num_threads() // len(jobs))
    processes = [
        context.Process(target=do_one, name=name, args=(threads, *job), daemon=True) for name, job in jobs.items()
    ]
    try:
        heeding = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which they inherit, before they can ask for it
        for process in processes:
            process.start()
        signal.signal(signal.SIGINT, heeding)
        running = {process.sentinel: process for process in processes}
        while running:
            for sentinel in multiprocessing.connection.wait(list(running)):
                process = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    raise Error(f"{process.name} failed; what it printed says why")
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def do_one(threads: int, function: Callable, arguments: tuple) -> None:
    """One job of ``in_processes``. Ctrl-C is for the parent to answer, and without the parent it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        function(*arguments)
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def end_with_parent() -> None:
    """A parent that was killed cannot end its children: they watch for it."""
    multiprocessing.parent_process().join()
    os._exit(1)
