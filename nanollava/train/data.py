"""Groups of records become packed batches (LLaVA section 4.2).

    record     an entry of the JSON file; an example is the same as ids and labels
    group      what a step draws, --batch-size of them: an example, or all about one image (--share-images)
    document   a group in a row, or several documents where that is too long; a branch is one example of it
    row        documents behind each other, at most max_length positions
    Batch      rows of one forward pass; a step has one or several (micro-batches)

Nothing is padded that can be packed: short documents share a row and do not see each other. Records about the same
image can share one copy of it (``group_by_image``): what they begin with becomes the beginning of a document, each
record a branch behind it. The loss is that of the records one by one; the image is paid for once. A row of two examples
about one image (of N = 2 patches), an example without one, and padding; . stands for -100 and -1:

    token_ids   1  img img  11  12  13   21  22  23 |  1  31  32  33 |  0
    labels      .   .   .    .  12  13    .  22  23 |  .   .  32  33 |  .
    patches     .   0   1    .   .   .    .   .   . |  .   .   .   . |  .
    positions   0   1   2    3   4   5    3   4   5 |  0   1   2   3 |  0
    documents   0   0   0    0   0   0    0   0   0 |  1   1   1   1 |  .
    branches    0   0   0    1   1   1    2   2   2 |  1   1   1   1 |  0

``python -m nanollava.train.data check FILE --images DIR`` tells what training would refuse of a file (check.py).
"""

import os
import sys
import zlib
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch

from nanollava.conversation import IGNORE
from nanollava.error import Error
from nanollava.images import open_image, preprocess
from nanollava.llava import NO_PATCH, Batch, LlavaConfig, Spliced, splice
from nanollava.train.features import FeatureCache
from nanollava.train.records import Example, image_path


class Document(NamedTuple):
    """Examples behind one shared beginning, as columns of equal length; branches counts 0 (shared), 1, 2, ..."""

    columns: Spliced
    positions: list[int]
    branches: list[int]
    images: tuple[str, ...]


def documents(examples: list[Example], num_patches: int, max_length: int) -> Iterator[Document]:
    """One document, or several where the branches do not fit into ``max_length`` positions together."""
    spliced = [splice(e.token_ids.tolist(), e.labels.tolist(), num_patches, max_length) for e in examples]
    shared = shared_length(spliced) if len(spliced) > 1 else 0
    while spliced:
        length, count = shared, 0
        while count < len(spliced) and (count == 0 or length + len(spliced[count].labels) - shared <= max_length):
            length += len(spliced[count].labels) - shared
            count += 1
        yield join_branches(spliced[:count], shared, examples[0].images)
        spliced = spliced[count:]


def shared_length(spliced: list[Spliced]) -> int:
    """How many positions all sequences begin with in common, ending before the position in front of the first target:
    a target is predicted from there, so that position must be its branch's own."""
    columns = zip(*(zip(s.token_ids, s.patches, strict=True) for s in spliced), strict=False)
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    targets = min(next((i for i, label in enumerate(s.labels) if label != IGNORE), len(s.labels)) for s in spliced)
    return max(0, min(common, targets - 1))


def join_branches(spliced: list[Spliced], shared: int, images: tuple[str, ...]) -> Document:
    columns = Spliced(*(column[:shared] for column in spliced[0]))
    positions, branches = list(range(shared)), [0] * shared
    for number, s in enumerate(spliced, start=1):
        for column, more in zip(columns, s, strict=True):
            column.extend(more[shared:])
        positions.extend(range(shared, len(s.labels)))
        branches.extend([number] * (len(s.labels) - shared))
    return Document(columns, positions, branches, images)


def pack(docs: Iterable[Document], max_length: int) -> list[list[Document]]:
    """The fewest rows of at most ``max_length`` positions that best fit finds, and of these the shortest: rows of one
    batch are padded to the longest of them, so all are filled about equally."""
    docs = sorted(docs, key=lambda doc: -len(doc.positions))
    lengths = [len(doc.positions) for doc in docs]
    rows = best_fit(lengths, max_length)
    if rows:
        limits = range(max(lengths[0], -(-sum(lengths) // len(rows))), max_length)
        enough = bisect_left(limits, True, key=lambda limit: len(best_fit(lengths, limit)) <= len(rows))
        rows = best_fit(lengths, limits[enough]) if enough < len(limits) else rows
    return [[docs[number] for number in row] for row in rows]


def best_fit(lengths: list[int], limit: int) -> list[list[int]]:
    """Numbers of the lengths in rows whose sums are at most ``limit``: each, in order, into the fullest row with room.
    From the longest to the shortest it is best-fit decreasing (Johnson et al., 1974), never above 11/9 of the fewest
    rows possible, and 4."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free positions, row), sorted
    for number, length in enumerate(lengths):
        place = bisect_left(rooms, (length, 0))
        if place == len(rooms):
            room, row = limit, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(place)
        rows[row].append(number)
        insort(rooms, (room - length, row))
    return rows


def collate(rows: list[list[Document]], num_patches: int, load: Callable[[str], torch.Tensor]) -> Batch:
    """Rows of documents -> a batch; ``load`` gives what the model takes of an image name: pixels (3, S, S)."""
    length = -(-max(sum(len(d.positions) for d in row) for row in rows) // 64) * 64  # few shapes: fewer compilations
    fill = {"token_ids": 0, "labels": IGNORE, "patches": NO_PATCH, "positions": 0, "documents": -1, "branches": 0}
    table = {name: torch.full((len(rows), length), value) for name, value in fill.items()}
    pixels: list[torch.Tensor] = []
    for r, row in enumerate(rows):
        start = 0
        for number, doc in enumerate(row):
            end = start + len(doc.positions)
            first = len(pixels) * num_patches
            numbers = [p if p == NO_PATCH else p + first for p in doc.columns.patches]
            values = doc.columns.token_ids, doc.columns.labels, numbers, doc.positions, number, doc.branches
            for column, value in zip(table.values(), values, strict=True):
                column[r, start:end] = torch.tensor(value)
            pixels.extend(map(load, doc.images))
            start = end
    return Batch(**table, pixels=torch.stack(pixels) if pixels else None)


class Dataset:
    """Groups of examples by number, and the micro-batches made of them."""

    def __init__(
        self,
        groups: list[list[Example]],
        folder: str | Path | None,
        config: LlavaConfig,
        features: FeatureCache | None = None,
    ):
        self.groups, self.folder, self.config, self.features = groups, folder, config, features
        workers = min(16, os.cpu_count() or 1)
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        self.broken: set[str] = set()  # images that failed in decoding

    def __len__(self) -> int:
        return len(self.groups)

    @cached_property
    def checksum(self) -> int:
        """A number that tells other texts, images or another order from these."""
        value = 0
        for example in (example for examples in self.groups for example in examples):
            names = "\0".join(example.images).encode(errors="surrogatepass")
            value = zlib.crc32(names, zlib.crc32(example.token_ids, value))
        return value

    def batches(
        self, numbers: Iterable[int], rows_at_once: int = 0, parts: int = 1, share: tuple[int, int] = (0, 1)
    ) -> list[Batch]:
        """The chosen groups packed into rows, ``rows_at_once`` of them in each micro-batch (0: ``parts`` micro-batches
        with about equal shares). ``share`` (number, processes) takes one process's part of the rows.

        A document whose image turns out damaged is left out, with a line on stderr.
        """
        patches, limit = self.config.vision.num_patches, self.config.max_length
        docs = (doc for n in numbers for doc in documents(self.groups[n], patches, limit))
        number, processes = share
        rows = pack(docs, limit)[number::processes]  # the first rows are the fullest; whoever packs them, packs alike
        names = sorted({name for row in rows for doc in row for name in doc.images})
        pixels = dict(zip(names, self.pool.map(self.load, names), strict=True))
        rows = [[doc for doc in row if all(pixels[name] is not None for name in doc.images)] for row in rows]
        rows = list(filter(None, rows))
        if rows_at_once:
            chosen = [rows[i : i + rows_at_once] for i in range(0, len(rows), rows_at_once)]
        else:
            chosen = [rows[i::parts] for i in range(min(parts, len(rows)))]
        return [collate(some, patches, pixels.__getitem__) for some in chosen]

    def damage(self) -> str:
        """How much was left out for images that failed in decoding, in words; "" where nothing was."""
        examples = (example for examples in self.groups for example in examples)
        records = sum(not self.broken.isdisjoint(example.images) for example in examples)
        return f"skipped: {records:,} records, for {len(self.broken):,} damaged images" if records else ""

    def load(self, name: str) -> torch.Tensor | None:
        """What the model takes of an image: its pixels (3, S, S), or its patch features (N, C) where they are cached.

        None, with a line on stderr the first time, where the file is damaged. Raises Error where it is gone.
        """
        if self.features:
            return self.features.get(image_path(self.folder, name), lambda: self.pixels(name))
        return self.pixels(name)

    def pixels(self, name: str) -> torch.Tensor | None:
        file = image_path(self.folder, name)
        try:
            image = open_image(file)
        except Error as error:
            if not os.path.exists(file):  # it was there before the start: a disk that went away takes all with it
                raise Error(f"{file}: is gone since training began; bring it back and go on with --resume") from error
            if name not in self.broken:
                self.broken.add(name)
                print(f"skipped: {error}", file=sys.stderr)
            return None
        return preprocess(image, self.config.vision.image_size, self.config.image_aspect_ratio)


def draw_steps(groups: int, batch_size: int, seed: int, skip: int = 0) -> Iterator[list[int]]:
    """Endlessly, the group numbers of a step: every epoch a new permutation, a step may reach into the next epoch. A
    pure function of its arguments, so that a resumed run only has to ``skip`` the steps that were trained on."""
    first = skip * batch_size
    epoch, numbers = first // groups, []
    offset = first % groups
    while True:
        order = torch.randperm(groups, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        numbers += order[offset:]
        epoch, offset = epoch + 1, 0
        while len(numbers) >= batch_size:
            yield numbers[:batch_size]
            numbers = numbers[batch_size:]


def count_targets(batches: list[Batch]) -> int:
    """How many positions are to be predicted."""
    return sum(int((b.labels[:, 1:] != IGNORE).sum()) for b in batches)


if __name__ == "__main__":
    from nanollava.train.check import main  # what training would refuse of a file; it builds on the model

    raise SystemExit(main())
