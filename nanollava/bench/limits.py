"""What the machine itself can do, measured in the same run as the work that is held against it.

copy            bytes read and written a second, as one large tensor is copied into another
matrix-vector   bytes of weights read a second, as vectors are multiplied with matrices of 500 MB in all: decoding
                one sequence does nothing else
product         operations a second, as two large square matrices are multiplied: what prefill and training do
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

BYTES = 500 * 10**6


@dataclass(frozen=True)
class Limits:
    """GB/s, GB/s and GFLOP/s; a product of an (m, k) and a (k, n) matrix counts 2 m k n operations."""

    copy: float
    vector: float
    product: float


@torch.inference_mode()
def measure_limits(device: torch.device, dtype: torch.dtype, repetitions: int = 5) -> Limits:
    """The best of several, each in the dtype that the work is done in."""
    on_cuda = device.type == "cuda"
    side = 4096 if on_cuda else 1536  # a matrix that no processor's cache keeps until it is its turn again
    count = max(1, BYTES // (side * side * dtype.itemsize))
    return Limits(
        copy=copy_rate(device, BYTES, repetitions) / 1e9,
        vector=vector_rate(device, dtype, side, count, repetitions) / 1e9,
        product=product_rate(device, dtype, 8192 if on_cuda else 2048, repetitions) / 1e9,
    )


def copy_rate(device: torch.device, size: int, repetitions: int) -> float:
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / best(device, lambda: target.copy_(source), repetitions)


def vector_rate(device: torch.device, dtype: torch.dtype, side: int, count: int, repetitions: int) -> float:
    """``count`` matrices in a row, each multiplied with what the one before gave."""
    matrices = [torch.full((side, side), 1 / side, dtype=dtype, device=device) for _ in range(count)]
    start = torch.ones(1, side, dtype=dtype, device=device)

    def work() -> None:
        x = start
        for matrix in matrices:
            x = torch.nn.functional.linear(x, matrix)

    return count * side * side * dtype.itemsize / best(device, work, repetitions)


def product_rate(device: torch.device, dtype: torch.dtype, side: int, repetitions: int) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / best(device, lambda: a @ b, repetitions)


def best(device: torch.device, work: Callable[[], object], repetitions: int) -> float:
    """Seconds of the fastest repetition, the first one (memory is taken, kernels are chosen) apart. What a GPU does is
    queued: it is timed ten times in a row, so that the queue never runs empty."""
    times = 10 if device.type == "cuda" else 1
    seconds(device, work)
    return min(seconds(device, lambda: [work() for _ in range(times)]) / times for _ in range(repetitions))


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """How long it takes until it is done, on a GPU too."""
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    """Until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
