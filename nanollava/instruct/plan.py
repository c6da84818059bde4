"""Which image gets which kinds of record: 58 conversations to 23 descriptions to 77 of reasoning, as in the paper."""

import random
from typing import NamedTuple

from nanollava.error import Error
from nanollava.instruct.contexts import Context
from nanollava.miniature.teacher import PROPORTIONS


class Item(NamedTuple):
    """One record to be made."""

    key: str
    kind: str
    context: Context


def make_plan(contexts: list[Context], kinds: list[str], records: int | None, seed: int) -> list[Item]:
    """The records to be made, in the order of the result: ``records`` of them, or as many as the images allow.

    No image gets a kind twice, and none a second record before all have one (or all but one, where a largest remainder
    jumps). With more records the plan grows: what was asked for a smaller one serves the larger. Raises Error where the
    images are too few.
    """
    rng = random.Random(f"plan {seed}")
    images = rng.sample(contexts, len(contexts))
    most = most_records(len(images), kinds)
    counts = shares(most if records is None else records, kinds)
    if records is not None and (records < 1 or max(counts.values()) > len(images)):
        raise Error(f"--records {records}: give 1 to {most:,}; {len(images):,} images allow no more, each kind once")
    dealt, start = [], 0
    for kind, own in shares(len(images), kinds).items():  # images that are its own; then those of the next kind
        dealt += [(kind, images[(start + number) % len(images)]) for number in range(counts[kind])]
        start += own
    rng.shuffle(dealt)  # so that a run that is stopped has some of all
    return [Item(f"{context.id}-{kind}", kind, context) for kind, context in dealt]


def shares(records: int, kinds: list[str]) -> dict[str, int]:
    """How many records of each kind, by largest remainder."""
    whole = sum(PROPORTIONS[kind] for kind in kinds)
    counts = {kind: records * PROPORTIONS[kind] // whole for kind in kinds}
    by_remainder = sorted(kinds, key=lambda kind: -(records * PROPORTIONS[kind] % whole))
    for kind in by_remainder[: records - sum(counts.values())]:
        counts[kind] += 1
    return counts


def most_records(images: int, kinds: list[str]) -> int:
    """The most records of which no kind has more than there are images."""
    parts = [PROPORTIONS[kind] for kind in kinds]
    most = images * sum(parts) // max(parts) + len(parts)
    while max(shares(most, kinds).values()) > images:
        most -= 1
    return most
