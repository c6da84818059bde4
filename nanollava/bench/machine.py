"""The machine and the versions that figures belong to, and how much room it has."""

import ctypes
import gc
import importlib.metadata
import platform
import sys
from pathlib import Path

import torch

from nanollava.train.machine import processor


def description(device: torch.device) -> dict[str, object]:
    """Names and numbers for the JSON."""
    on_cuda = device.type == "cuda"
    packages = ("torch", "transformers", "peft")
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_cuda else str(device),
        "memory": torch.cuda.get_device_properties(device).total_memory if on_cuda else total_memory(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def free_memory(device: torch.device) -> float:
    """Bytes that can still be taken; infinite where the system does not tell. What was freed goes back before."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # training asks glibc to keep it
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _told("MemAvailable:")


def total_memory() -> float | None:
    """Bytes of the machine; None where the system does not tell."""
    return None if _told("MemTotal:") == float("inf") else _told("MemTotal:")


def _told(name: str) -> float:
    """A line of /proc/meminfo, in bytes."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), float("inf"))


def lack(needed: float, device: torch.device) -> str:
    return f"takes about {needed / 1e9:.0f} GB of memory, {free_memory(device) / 1e9:.0f} are free"
