"""Records in the official format become packed batches (LLaVA section 4.2).

    JSON file -> checked records -> examples (ids, labels, images) -> groups, the units that a step draws
    -> documents -> rows of at most max_length positions -> micro-batches

Nothing is padded that can be packed: short documents share a row and do not see each other. Records about the same
image can share one copy of it (``group_by_image``): the tokens that they begin with become the document's shared
beginning, each record a branch behind it. The loss is that of the records one by one; the image is paid for once.
"""

import json
import os
import sys
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch

from nanollava.conversation import IGNORE, encode, images_from_record, messages_from_record
from nanollava.error import Error, first_line, printable
from nanollava.images import check_image, open_image, preprocess
from nanollava.llava import NO_PATCH, Batch, LlavaConfig, Spliced, splice
from nanollava.tokenizer import IMAGE_TOKEN_ID, Tokenizer


class Example(NamedTuple):
    """One record, tokenized; images has one path for each placeholder in token_ids."""

    token_ids: np.ndarray  # (T,) int32
    labels: np.ndarray  # (T,) int32
    images: tuple[str, ...]


@dataclass
class Report:
    """What reading a file found: the records that cannot be trained on, and how many will be cut."""

    problems: list[str] = field(default_factory=list)  # one line for each bad record, its id first
    cut: int = 0  # longer than max_length: their ends are lost
    lost: int = 0  # of these, records cut before the first word of an answer: left out, nothing is learnt from them
    unmarked: int = 0  # records with an image that no <image> mark points to: it is not shown
    records: int = 0


def read_list(file: str | Path) -> list[dict]:
    """The records of an official file, a JSON array. Raises Error where it is missing, broken or not an array."""
    try:
        records = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise Error(f"{file}: cannot be read ({error.strerror}); give the JSON file of the records") from error
    except (ValueError, RecursionError) as error:
        raise Error(f"{file}: is not whole JSON ({first_line(error)}); fetch or write it again") from error
    if not isinstance(records, list) or not records:
        raise Error(f"{file}: must be a JSON array of records, with at least one in it")
    return records


def image_path(folder: str | Path, name: str) -> Path:
    """Where the image ``name`` of a record lies. Raises Error for a name that leads out of the folder."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
        raise Error(f"image name {name!r} leads out of the image folder; use a path inside it")
    return Path(folder) / name


def make_example(record: dict, tokenizer: Tokenizer, config: LlavaConfig, template: str) -> Example:
    """Raises Error for a record that cannot be learnt from."""
    messages = messages_from_record(record)
    images = images_from_record(record)
    token_ids, labels = encode(messages, tokenizer, template, images=len(images))
    marks = token_ids.count(IMAGE_TOKEN_ID)
    images = images * marks if len(images) == 1 else images  # every marked turn shows the one image
    room = config.max_length - marks * (config.vision.num_patches - 1)
    last = max((i for i, token in enumerate(token_ids) if token == IMAGE_TOKEN_ID), default=-1)
    if last >= room:
        raise Error(f"{marks} images do not fit into {config.max_length} positions; raise --max-length")
    return Example(np.array(token_ids, np.int32), np.array(labels, np.int32), tuple(images))


def read_records(
    file: str | Path, image_folder: str | Path | None, tokenizer: Tokenizer, config: LlavaConfig, template: str
) -> tuple[list[Example], Report]:
    """All good examples of a file, and a report that names every bad record. Images are judged by their headers."""
    examples, report, seen = [], Report(), {}
    for number, record in enumerate(read_list(file)):
        report.records += 1
        record = {"id": f"number {number}", **record} if isinstance(record, dict) else record
        try:
            example = make_example(record, tokenizer, config, template)
            for name in example.images:
                check_once(name, image_folder, seen)
        except Error as error:
            name = str(record["id"]) if isinstance(record, dict) else f"number {number}"
            problem = str(error).removeprefix(f"record {name}: ")
            report.problems.append(f"record {printable(name, 100)}: {printable(problem, 500)}")
            continue
        report.unmarked += bool(record.get("image")) and not example.images
        length = len(example.token_ids) + len(example.images) * (config.vision.num_patches - 1)
        report.cut += length > config.max_length
        if first_target(example, config.vision.num_patches) >= config.max_length:
            report.lost += 1
        else:
            examples.append(example)
    return examples, report


def first_target(example: Example, num_patches: int) -> int:
    """The position, images widened, of the first token that carries loss."""
    first = int((example.labels != IGNORE).argmax())
    return first + int((example.token_ids[:first] == IMAGE_TOKEN_ID).sum()) * (num_patches - 1)


def check_once(name: str, folder: str | Path | None, seen: dict[str, str]) -> None:
    """check_image for a name met for the first time; the same Error again for one met before."""
    if name not in seen:
        try:
            if folder is None:
                raise Error(f"image {name}: no image folder given; add --images FOLDER")
            check_image(image_path(folder, name))
            seen[name] = ""
        except Error as error:
            seen[name] = str(error)
    if seen[name]:
        raise Error(seen[name])


def group(examples: list[Example], keys: Iterable[Hashable]) -> list[list[Example]]:
    """Examples with equal keys together, in the order of first appearance: the units that are shuffled."""
    groups: dict[Hashable, list[Example]] = {}
    for example, key in zip(examples, keys, strict=True):
        groups.setdefault(key, []).append(example)
    return list(groups.values())


def group_by_image(examples: list[Example]) -> list[list[Example]]:
    """Examples about the same images together; those without images each by themselves."""
    return group(examples, (example.images or number for number, example in enumerate(examples)))


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
    """Rows of at most ``max_length`` positions: the longest document first, each into the first row with room."""
    rows: list[tuple[int, list[Document]]] = []
    for doc in sorted(docs, key=lambda d: -len(d.positions)):
        length = len(doc.positions)
        i = next((i for i, (used, _) in enumerate(rows) if used + length <= max_length), len(rows))
        if i == len(rows):
            rows.append((0, []))
        rows[i] = (rows[i][0] + length, [*rows[i][1], doc])
    return [docs for _, docs in rows]


def collate(rows: list[list[Document]], num_patches: int, load: Callable[[str], torch.Tensor]) -> Batch:
    """Rows of documents -> a batch; ``load`` gives the pixels (3, S, S) of an image name."""
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

    def __init__(self, groups: list[list[Example]], folder: str | Path | None, config: LlavaConfig, workers: int = 2):
        self.groups, self.folder, self.config = groups, folder, config
        self.pool = ThreadPoolExecutor(workers)
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

    def batches(self, numbers: Iterable[int], rows_at_once: int = 0, parts: int = 1) -> list[Batch]:
        """The chosen groups packed into rows, ``rows_at_once`` of them in each micro-batch (0: ``parts`` micro-batches
        with about equal shares).

        A group whose image turns out damaged is left out, with a line on stderr.
        """
        groups = [self.groups[n] for n in numbers]
        names = sorted({name for examples in groups for example in examples for name in example.images})
        pixels = dict(zip(names, self.pool.map(self.load, names), strict=True))
        whole = [g for g in groups if all(pixels[name] is not None for name in g[0].images)]
        patches, limit = self.config.vision.num_patches, self.config.max_length
        rows = pack((doc for examples in whole for doc in documents(examples, patches, limit)), limit)
        if rows_at_once:
            chosen = [rows[i : i + rows_at_once] for i in range(0, len(rows), rows_at_once)]
        else:
            chosen = [rows[i::parts] for i in range(min(parts, len(rows)))]  # the first rows are the fullest
        return [collate(some, patches, pixels.__getitem__) for some in chosen]

    def damage(self) -> str:
        """How much was left out for images that failed in decoding, in words; "" where nothing was."""
        examples = (example for examples in self.groups for example in examples)
        records = sum(not self.broken.isdisjoint(example.images) for example in examples)
        return f"skipped: {records:,} records, for {len(self.broken):,} damaged images" if records else ""

    def load(self, name: str) -> torch.Tensor | None:
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
