"""Records in the official format are read and checked, one by one, before anything is trained on.

JSON file -> checked records -> examples (ids, labels, images) -> groups, the units that a step draws
"""

import json
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch

from nanollava.conversation import IGNORE, encode, images_from_record, messages_from_record
from nanollava.error import Error, first_line, printable
from nanollava.images import check_image
from nanollava.llava import LlavaConfig
from nanollava.tokenizer import IMAGE_TOKEN_ID, Tokenizer


class Example(NamedTuple):
    """One record, tokenized; images has one path for each placeholder in token_ids."""

    token_ids: np.ndarray  # (T,) int32
    labels: np.ndarray  # (T,) int32
    images: tuple[str, ...]


# What a record that can be read may lose, and is never to lose in silence: each kind, and what training does. The kinds
# of what is refused come with their Error.
CUT, LOST, UNMARKED, SPARE = "cut", "lost", "unmarked", "spare"
LOSSES = {
    CUT: "longer than a row: its end is cut off",
    LOST: "cut before the first word of an answer: left out, nothing is learnt from it",
    UNMARKED: "no <image> mark points to its image: read as text alone",
    SPARE: "begins with an answer, or ends with a question: that turn is left out",
}


class Finding(NamedTuple):
    """What is to be said of one record."""

    kind: str  # one of LOSSES, or the kind of an Error
    record: str  # its id
    number: int  # where it stands in the file, from 0; an id may be that of several records
    problem: str = ""  # why it cannot be trained on; "" where it can

    @property
    def name(self) -> str:
        """The id and the number."""
        return self.record if self.record == f"number {self.number}" else f"{self.record} (number {self.number})"


@dataclass
class Report:
    """What reading a file found."""

    records: int = 0
    findings: list[Finding] = field(default_factory=list)  # in the order of the file; a record may have several

    def named(self, kind: str) -> list[str]:
        """The ids of the records with a finding of that kind."""
        return [finding.record for finding in self.findings if finding.kind == kind]

    @property
    def problems(self) -> list[str]:
        """One line for each record that cannot be trained on, its id first."""
        return [f"record {finding.record}: {finding.problem}" for finding in self.findings if finding.problem]


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
        raise Error(f"image name {name!r} leads out of the image folder; use a path inside it", "image name")
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
        need = f"{last + 1 + marks * (config.vision.num_patches - 1):,} positions to the end of its last image"
        raise Error(f"it takes {need} ({marks} in all), a row has {config.max_length:,}; raise --max-length", "no room")
    return Example(np.array(token_ids, np.int32), np.array(labels, np.int32), tuple(images))


@dataclass
class Reader:
    """Reads records one by one: what training and the checker (check.py) think of a record is decided here."""

    image_folder: str | Path | None
    tokenizer: Tokenizer
    config: LlavaConfig
    template: str
    look: Callable[[Path], object] = check_image  # raises Error where an image is bad; this one reads its header
    seen: dict[str, tuple[str, str]] = field(default_factory=dict)  # line and kind of that Error, for each image name
    report: Report = field(default_factory=Report)

    def read(self, record: dict) -> Example | None:
        """The example of the file's next record; None where it cannot be trained on. The report tells why."""
        number, self.report.records = self.report.records, self.report.records + 1
        record = {"id": f"number {number}", **record} if isinstance(record, dict) else record
        name = str(record["id"]) if isinstance(record, dict) else f"number {number}"
        shown = printable(name, 100)
        try:
            example = make_example(record, self.tokenizer, self.config, self.template)
            for image in example.images:
                self.check_once(image)
        except Error as error:
            problem = str(error).removeprefix(f"record {name}: ")
            self.report.findings.append(Finding(error.kind, shown, number, printable(problem, 500)))
            return None
        kinds = self.losses(record, example)
        self.report.findings += [Finding(kind, shown, number) for kind in kinds]
        return None if LOST in kinds else example

    def losses(self, record: dict, example: Example) -> list[str]:
        """What a record that can be read loses, in the order of LOSSES."""
        patches, limit = self.config.vision.num_patches, self.config.max_length
        length = len(example.token_ids) + len(example.images) * (patches - 1)
        found = {
            CUT: length > limit,
            LOST: first_target(example, patches) >= limit,
            UNMARKED: bool(record.get("image")) and not example.images,
            SPARE: has_spare_turn(record),
        }
        return [kind for kind, yes in found.items() if yes]

    def check_once(self, name: str) -> None:
        """Look at an image whose name is met for the first time; raise the same Error again for one met before."""
        if name not in self.seen:
            try:
                if self.image_folder is None:
                    raise Error(f"image {name}: no image folder given; add --images FOLDER", "no image folder")
                self.look(image_path(self.image_folder, name))
                self.seen[name] = ("", "")
            except Error as error:
                self.seen[name] = (str(error), error.kind)
        if self.seen[name][0]:
            raise Error(*self.seen[name])


def read_records(
    file: str | Path, image_folder: str | Path | None, tokenizer: Tokenizer, config: LlavaConfig, template: str
) -> tuple[list[Example], Report]:
    """All good examples of a file, and a report that names every bad record. Images are judged by their headers."""
    reader = Reader(image_folder, tokenizer, config, template)
    examples = [example for record in read_list(file) if (example := reader.read(record)) is not None]
    return examples, reader.report


def has_spare_turn(record: dict) -> bool:
    """Whether ``messages_from_record`` left a turn of it out."""
    turns = record["conversations"]
    return turns[0].get("from") != "human" or turns[-1]["from"] == "human"


def first_target(example: Example, num_patches: int) -> int:
    """The position, images widened, of the first token that carries loss."""
    first = int((example.labels != IGNORE).argmax())
    return first + int((example.token_ids[:first] == IMAGE_TOKEN_ID).sum()) * (num_patches - 1)


def group(examples: list[Example], keys: Iterable[Hashable]) -> list[list[Example]]:
    """Examples with equal keys together, in the order of first appearance: the units that are shuffled."""
    groups: dict[Hashable, list[Example]] = {}
    for example, key in zip(examples, keys, strict=True):
        groups.setdefault(key, []).append(example)
    return list(groups.values())


def group_by_image(examples: list[Example]) -> list[list[Example]]:
    """Examples about the same images together; those without images each by themselves."""
    return group(examples, (example.images or number for number, example in enumerate(examples)))


def hold_out(groups: list[list[Example]], share: float, seed: int) -> tuple[list[list[Example]], list[list[Example]]]:
    """A part to train on and a ``share`` for validation: no image is in both."""
    subjects = list(connected(groups))
    order = torch.randperm(len(subjects), generator=torch.Generator().manual_seed(seed)).tolist()
    held = {i for subject in order[: max(1, round(share * len(subjects)))] for i in subjects[subject]}
    return [g for i, g in enumerate(groups) if i not in held], [groups[i] for i in sorted(held)]


def connected(groups: list[list[Example]]) -> Iterable[list[int]]:
    """The numbers of the groups, those together that share an image, if only by way of others."""
    leader, first = list(range(len(groups))), {}  # a group's leader leads to the first group of its kind

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = i = leader[leader[i]]
        return i

    for i, examples in enumerate(groups):
        for name in {name for example in examples for name in example.images}:
            leader[find(i)] = find(first.setdefault(name, i))
    subjects: dict[int, list[int]] = {}
    for i in range(len(groups)):
        subjects.setdefault(find(i), []).append(i)
    return subjects.values()
