"""Rows become the table, the targets beside what was measured, and the JSON."""

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nanollava.bench.limits import Limits
from nanollava.bench.ours import DECODERS
from nanollava.bench.rows import Row
from nanollava.error import Error

LIMITS = {"vector": "matrix-vector", "product": "matrix products", "plain read": "plain read", "": ""}
FOOTNOTE = """\
Limits were measured in the same run: copying {copy:,.1f} GB/s (read and written), matrix-vector products over 500 MB
{vector:,.1f} GB/s, a large matrix product {product:,.0f} GFLOP/s, both in {dtype}. Each row: the median of its
repetitions. Ratios are medians of pairs that alternate in one process, with their range; above 1 ours is faster.
Decoding reads all weights but the embedding, and the cache, for each token. Operations are those of the matrix products
that are needed, 2 m k n each, nothing recomputed: decoder 2 T (matrices of its blocks) + 4 H E (pairs that may look at
each other) x layers; head 2 V D at each predicted position; tower 2 N 3 P^2 C + [2 T (4 C^2 + 2 C I) + 4 C T^2] x
blocks; projector 2 N (C D + D^2). Backward: once more for inputs, once more for trained weights; none in the tower.
Useful tokens: all positions of the records, those of images too; padding is not counted."""


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(rows: Iterable[Row]) -> str:
    """Markdown, a line for each row."""
    head = ("model", "work", "ours", "of the limit", "transformers", "ratio", "")
    return markdown(head, "llrrrrl", map(cells_of, rows))


def markdown(head: tuple[str, ...], sides: str, lines: Iterable[tuple[str, ...]]) -> str:
    """A table; each column to the left or to the right."""
    bars = tuple({"l": "---", "r": "---:"}[side] for side in sides)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, bars, *lines))


def cells_of(row: Row) -> tuple[str, ...]:
    ours = f"{number(row.rate)} {row.unit}" if row.rate is not None else "-"
    reached = f"{row.reached:.0f}% of {LIMITS[row.limit]}" if row.reached is not None else "-"
    theirs = number(statistics.median(row.theirs)) if row.theirs else "-"
    return row.model, row.work, ours, reached, theirs, ratio(row), row.note


def line(row: Row) -> str:
    """A row as progress."""
    return "  ".join(filter(None, cells_of(row)))


def whole(machine: dict, limits: Limits, rows: list[Row], on_cuda: bool, dtype: torch.dtype) -> str:
    """What is printed."""
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers") if machine[name])
    title = f"{machine['processor']}, {machine['threads']} threads, {machine['device']}; {versions}"
    notes = footnote(limits, str(dtype).removeprefix("torch."))
    return "\n\n".join([title, table(rows), notes, targets(verdicts(rows, on_cuda))])


def ratio(row: Row) -> str:
    if row.ratio is None:
        return "-"
    low, high = min(row.ratios), max(row.ratios)
    return f"{row.ratio:.2f}x" + (f" ({low:.2f} to {high:.2f})" if len(row.ratios) > 1 else "")


def footnote(limits: Limits, dtype: str) -> str:
    return FOOTNOTE.format(**asdict(limits), dtype=dtype)


# ---------------------------------------------------------------- what is aimed at


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured; ``reached`` is None where it was not."""

    where: str
    work: str
    least: str
    measured: str = "not measured"
    reached: bool | None = None


Rows = dict[tuple[str, str], Row]  # by model and work
Measure = Callable[[Rows], list[tuple[str, bool]]]  # each part of a target: what was measured, whether that is enough


def find(rows: Rows, model: str, work: str) -> Row | None:
    """The row; for "decode" the fastest that computes with the weights as they are."""
    names = [name for name, how in DECODERS.items() if how.exact] if work == "decode" else [work]
    found = [row for name in names if (row := rows.get((model, name))) and row.rate is not None]
    return max(found, key=lambda row: row.rate, default=None)


def compared(model: str, work: str, least: float) -> Measure:
    """At least so many times transformers' rate."""

    def measure(rows: Rows) -> list[tuple[str, bool]]:
        row = find(rows, model, work)
        return [(f"{row.ratio:.2f}x", row.ratio >= least)] if row and row.ratio is not None else []

    return measure


def share(model: str, work: str, least: float) -> Measure:
    """At least so many percent of the limit."""

    def measure(rows: Rows) -> list[tuple[str, bool]]:
        row = find(rows, model, work)
        return [(f"{row.reached:.0f}%", row.reached >= least)] if row and row.reached is not None else []

    return measure


def gain(model: str, work: str, over: str, least: float) -> Measure:
    """At least so many times the rate of another of our rows."""

    def measure(rows: Rows) -> list[tuple[str, bool]]:
        row, base = find(rows, model, work), find(rows, model, over)
        if not (row and base):
            return []
        return [(f"{row.rate / base.rate:.2f}x", row.rate / base.rate >= least)]

    return measure


def detail(model: str, work: str, name: str, most: float, unit: str) -> Measure:
    """At most so much of something that was measured beside."""

    def measure(rows: Rows) -> list[tuple[str, bool]]:
        row = find(rows, model, work)
        found = max(row.detail.get(name, [])) if row and row.detail.get(name) else None
        return [] if found is None else [(f"{found:.2f}{unit}", found <= most)]

    return measure


CPU, H100 = "CPU", "H100 80 GB"
TARGETS: tuple[tuple[str, str, str, tuple[Measure, ...]], ...] = (
    (CPU, "decode after a 576-token image, 135M-like, float32, batch 1, against transformers `generate`",
     "3x its tokens/s", (compared("135m", "decode", 3),)),
    (CPU, "the same: bytes of weights and cache read per second, against matrix-vector products over 500 MB",
     "80%", (share("135m", "decode", 80),)),
    (CPU, "decode, int8 weights, against our own float32",
     "1.8x", (gain("135m", "decode, int8", "decode", 1.8),)),
    (CPU, "prefill (640 positions), 135M-like, against transformers",
     "1.8x, and 65% of the matrix-product rate", (compared("135m", "prefill", 1.8), share("135m", "prefill", 65))),
    (CPU, "stage 2 on one-image records of 1 to 5 turns, useful tokens/s against transformers with padded batches",
     "2x", (compared("135m", "stage 2 step", 2),)),
    (CPU, "7B folder: load time and peak memory against transformers",
     "faster; at most 1.1x the weights",
     (compared("7b", "load", 1), detail("7b", "load", "peak of ours", 1.1, "x the weights"))),
    (H100, "decode 7B bf16 batch 1",
     "85% of measured bandwidth, 4x transformers eager", (share("7b", "decode", 85), compared("7b", "decode", 4))),
    (H100, "decode 7B int8", "1.7x our bf16", (gain("7b", "decode, int8", "decode", 1.7),)),
    *((H100, f"{work} of 7B, packed rows of 2,048", "50% of the matrix-product rate; 1.5x transformers, padded",
       (share("7b", work, 50), compared("7b", work, 1.5)))
      for work in ("stage 1 step", "stage 2 step", "stage 2 step, LoRA")),
    (H100, "memory of full stage 2, rows of 2,048, batch 4",
     "under 75 GB", (detail("7b", "stage 2 step", "memory in GB", 75, " GB"),)),
)  # fmt: skip


def verdicts(rows: Iterable[Row], on_cuda: bool) -> list[Verdict]:
    """Every target of this kind of machine; "not measured" where a part of it was not."""
    found, made = {(row.model, row.work): row for row in rows}, []
    for where, work, least, measures in TARGETS:
        if (where == H100) != on_cuda:
            continue
        parts = [part for measure in measures for part in measure(found)]
        whole = len(parts) == len(measures)
        told = ", ".join(text for text, _ in parts) or "not measured"
        made.append(Verdict(where, work, least, told, all(enough for _, enough in parts) if whole else None))
    return made


def targets(made: list[Verdict]) -> str:
    """Markdown, a line for each target."""
    words = {True: "yes", False: "no", None: "-"}
    lines = [(v.where, v.work, v.least, v.measured, words[v.reached]) for v in made]
    return markdown(("where", "work", "at least", "measured", "reached"), "lllll", lines)


# ---------------------------------------------------------------- everything, for programs


def write(file: Path, machine: dict, limits: Limits, rows: list[Row], on_cuda: bool, complete: bool) -> None:
    """One JSON: the machine, versions, limits, every figure with its repetitions, the targets.

    Raises Error where it cannot be written; then what stood there is intact.
    """
    content = {
        "machine": machine,
        "limits": {"copy GB/s": limits.copy, "vector GB/s": limits.vector, "product GFLOP/s": limits.product},
        "rows": [row.record() for row in rows],
        "targets": [asdict(verdict) for verdict in verdicts(rows, on_cuda)],
        "complete": complete,
    }
    whole = file.resolve()
    plain = file.is_file() or not file.exists()  # a device has no name to give to another
    new = whole.with_name(f"{whole.name}.new") if plain else file
    try:
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if plain:
            new.replace(whole)
    except OSError as error:
        if plain:
            new.unlink(missing_ok=True)
        raise Error(f"--out {file}: cannot be written ({error.strerror}); free some space and run it again") from error
