"""A line now and then about work that takes long."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
EVERY = 10.0  # seconds


def progress(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """The items, ``total`` of them; on stderr every ten seconds how many are done and how long the rest will take."""
    began = last = time.perf_counter()
    for done, item in enumerate(items):
        now = time.perf_counter()
        if now - last >= EVERY:
            last, left = now, (now - began) / max(1, done) * (total - done)
            print(f"{done:,} of {total:,} {what}, about {left:.0f} s left", file=sys.stderr, flush=True)
        yield item


def minutes(seconds: float) -> str:
    """Minutes and seconds: 125 is 2:05."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
