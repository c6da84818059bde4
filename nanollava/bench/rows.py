"""One row of the table: a model, a piece of work, both libraries' figures."""

import statistics
from dataclasses import asdict, dataclass, field

from torch import Tensor

from nanollava.bench.ours import Done, Work


@dataclass
class Row:
    """Rates are units a second of each repetition; ``amounts`` what a unit takes of the limit: bytes or operations."""

    model: str
    work: str
    unit: str = ""
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)  # empty without transformers
    amounts: list[float] = field(default_factory=list)  # empty where no limit applies
    limit: str = ""  # a field of Limits
    limit_value: float = 0.0  # G a second
    agree: bool | None = None  # whether both computed the same; None: not compared
    note: str = ""
    detail: dict[str, list[float]] = field(default_factory=dict)  # what else was measured

    @property
    def rate(self) -> float | None:
        return statistics.median(self.ours) if self.ours else None

    @property
    def ratios(self) -> list[float]:
        """Ours by theirs, pair by pair: empty where different work would be compared."""
        return (
            [a / b for a, b in zip(self.ours, self.theirs, strict=True)]
            if self.theirs and self.agree is not False
            else []
        )

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def reached(self) -> float | None:
        """Percentage of the limit."""
        if not self.amounts or not self.limit_value:
            return None
        used = [rate * amount for rate, amount in zip(self.ours, self.amounts, strict=True)]
        return 100 * statistics.median(used) / (self.limit_value * 1e9)

    def record(self) -> dict:
        """For the JSON: all fields, and what follows from them."""
        return asdict(self) | {"rate": self.rate, "ratio": self.ratio, "ratios": self.ratios, "reached": self.reached}


def alternate(row: Row, ours: Work, theirs: Work | None, pairs: int, tolerance: float | None, warm: bool = True) -> Row:
    """Fill in a row: both at work in turn, each first every other time. Otherwise as ``settle``."""
    done = in_turn([ours, theirs] if theirs else [ours], pairs, warm)
    return settle(row, done[0], done[1] if theirs else [], tolerance)


def in_turn(works: list[Work], pairs: int, warm: bool = True) -> list[list[Done]]:
    """What each did, repetition by repetition. A first one of each warms up, and does not count."""
    done = [[] for _ in works]
    for repetition in range(-1 if warm else 0, pairs):
        for number in sorted(range(len(works)), reverse=bool(repetition % 2)):
            result = works[number](max(repetition, 0))
            done[number] += [result] if repetition >= 0 else []
    return done


def settle(row: Row, ours: list[Done], theirs: list[Done], tolerance: float | None) -> Row:
    """Rates into the row. What both computed is compared every time, to a relative ``tolerance`` (0: exactly; None: not
    at all): where it differs the row says so, and gives no ratio."""
    row.ours, row.theirs = [done.rate for done in ours], [done.rate for done in theirs]
    if theirs and tolerance is not None:
        errors = [difference(a.result, b.result) for a, b in zip(ours, theirs, strict=True)]
        row.detail["difference"], row.agree = errors, max(errors) <= tolerance
        row.note += "" if row.agree else f"NOT THE SAME WORK: results differ by {max(errors):.1e}"
    return row


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest, relative to the largest value; infinite for another shape, or where something is no number."""
    if found.shape != expected.shape:
        return float("inf")
    error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    return error if error == error else float("inf")
