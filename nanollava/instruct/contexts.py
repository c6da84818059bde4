"""What a teacher gets to know of an image: its captions and its boxes (LLaVA section 3, table 1), read from files.

Three kinds of input: COCO's captions_*.json and instances_*.json, of which the miniature world's are a copy in small,
and JSON lines {"id", "image", "captions": [...], "instances": [{"category", "bbox": [x1, y1, x2, y2]}]}.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nanollava.error import Error, first_line, printable, some
from nanollava.files import json_lines
from nanollava.folder import read_json
from nanollava.tokenizer import IMAGE_TOKEN

ANNOTATIONS = "give COCO's files of one split, captions_*.json and instances_*.json"
OUTSIDE = 0.1  # how far a corner may lie outside of its image, as a share of it


@dataclass(frozen=True)
class Context:
    """An image in words.

    id: as the records have it; COCO's numbers with 12 digits.
    image: the file's name below the image folder.
    instances: {"category": name, "bbox": [x1, y1, x2, y2]}, corners divided by width and height of the image.
    """

    id: str
    image: str
    captions: list[str]
    instances: list[dict] = field(default_factory=list)

    def text(self, boxes: bool) -> str:
        """The captions, one on a line; with ``boxes`` an empty line and a line for each of them follow."""
        lines = list(self.captions)
        if boxes and self.instances:
            lines += ["", *(f"{instance['category']}: {instance['bbox']}" for instance in self.instances)]
        return "\n".join(lines)


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """The options that ``read_input`` reads."""
    add = parser.add_argument_group("images in words: one of three").add_argument
    add("--captions", type=Path, metavar="FILE", help="COCO's captions_*.json ...")
    add("--instances", type=Path, metavar="FILE", help="... and instances_*.json of the same images")
    add("--contexts", type=Path, metavar="FILE", help="JSON lines, each an image with captions and boxes")
    add("--world", type=Path, metavar="DIR", help="a world that train.py miniature has drawn")
    add("--split", default="train", help="which part of the world: train (default), val or test")


def read_input(args: argparse.Namespace, boxes: bool = True) -> list[Context]:
    """The contexts that the options of ``add_input_options`` name. Without ``boxes`` none are needed, nor read.

    Raises Error where there is not exactly one input, and for whatever is wrong in its files, by file and entry.
    """
    if sum(x is not None for x in (args.captions, args.contexts, args.world)) != 1:
        raise Error("give one of --captions (with --instances), --contexts and --world")
    if args.instances and not args.captions:
        raise Error("--instances goes with --captions; leave it out")
    if args.contexts:
        return read_lines(args.contexts)
    if args.world:
        folder = args.world / "annotations"
        return read_coco(folder / f"captions_{args.split}.json", folder / f"instances_{args.split}.json")
    if boxes and not args.instances:
        raise Error("--captions: give --instances too, the boxes of the same images")
    return read_coco(args.captions, args.instances if boxes else None)


# ---------------------------------------------------------------- COCO


def read_coco(captions: Path, instances: Path | None) -> list[Context]:
    """The images of a captions file in its order, each with its boxes in the order of the other file."""
    told = read_json(captions, ANNOTATIONS)
    images = by_id(told, "images", captions)
    texts: dict[int, list[str]] = {number: [] for number in images}
    for number, annotation, place in annotations(told, images, captions):
        texts[number].append(caption(annotation.get("caption"), f"{place}: caption"))
    if silent := [str(number) for number, found in texts.items() if not found]:
        raise Error(f"{captions}: no captions for {some(silent)} of its images; remove them, or fetch the file again")
    boxes = read_boxes(instances, images, captions) if instances else {}
    return [
        Context(name_of(number), text(image.get("file_name"), f"{captions}: image {number}: file_name"), texts[number],
                boxes.get(number, []))
        for number, image in images.items()
    ]  # fmt: skip


def read_boxes(file: Path, wanted: dict[int, dict], captions: Path) -> dict[int, list[dict]]:
    """The boxes of the ``wanted`` images."""
    boxed = read_json(file, ANNOTATIONS)
    images, kinds = by_id(boxed, "images", file), by_id(boxed, "categories", file)
    if unknown := [str(number) for number in wanted if number not in images]:
        raise Error(f"{file}: images of {captions} are not in it: {some(unknown)}; {ANNOTATIONS}")
    boxes: dict[int, list[dict]] = {}
    for number, annotation, place in annotations(boxed, images, file):
        if number not in wanted:
            continue
        kind = annotation.get("category_id")
        if not isinstance(kind, int) or kind not in kinds:
            raise Error(f"{place}: category_id {printable(repr(kind), 50)} is none of its categories")
        kind = kinds[kind]
        category = text(kind.get("name"), f"{file}: category {kind['id']}: name")
        corners = normalised(annotation.get("bbox"), images[number], f"{file}: image {number}", place)
        boxes.setdefault(number, []).append({"category": category, "bbox": corners})
    return boxes


def normalised(box: object, image: dict, image_place: str, place: str) -> list[float]:
    """COCO's [x, y, width, height] in pixels -> corners, divided by width and height, with 3 decimals."""
    width, height = (image.get(name) for name in ("width", "height"))
    if not is_number(width) or not is_number(height) or width <= 0 or height <= 0:
        raise Error(f"{image_place}: width and height are missing, or no sizes; boxes need them")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise Error(f"{place}: bbox: give four numbers, [x, y, width, height] in pixels")
    x, y, w, h = box
    return corners([x / width, y / height, (x + w) / width, (y + h) / height], place)


def by_id(content: dict, name: str, file: Path) -> dict[int, dict]:
    """The entries of a list of COCO's by their ids. Raises Error where two have the same."""
    found: dict[int, dict] = {}
    for entry in entries(content, name, file):
        number = entry.get("id")
        if not isinstance(number, int) or isinstance(number, bool):
            raise Error(f"{file}: {name}: an entry with id {printable(repr(number), 50)}; ids are whole numbers")
        if number in found:
            raise Error(f"{file}: {name}: id {number} is there twice; remove one")
        found[number] = entry
    if not found:
        raise Error(f"{file}: {name}: the list is empty; fetch the file again")
    return found


def annotations(content: dict, images: dict[int, dict], file: Path) -> Iterator[tuple[int, dict, str]]:
    """(id of its image, annotation, what to call it in an error)."""
    for position, annotation in enumerate(entries(content, "annotations", file)):
        place, number = f"{file}: annotation {annotation.get('id', f'number {position}')}", annotation.get("image_id")
        if not isinstance(number, int) or number not in images:
            raise Error(f"{place}: image_id {printable(repr(number), 50)} is none of its images; fetch the file again")
        yield number, annotation, place


def entries(content: dict, name: str, file: Path) -> list[dict]:
    found = content.get(name)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise Error(f"{file}: {name}: missing, or not a list of objects; {ANNOTATIONS}")
    return found


# ---------------------------------------------------------------- JSON lines


def read_lines(file: Path) -> list[Context]:
    """The contexts of a file of JSON lines, in its order."""
    found: dict[str, Context] = {}
    for place, entry in json_lines(file):
        context = context_of(entry, place)
        if context.id in found:
            raise Error(f"{place}: id {context.id} is there a second time; remove one")
        found[context.id] = context
    if not found:
        raise Error(f"{file}: no line in it; give a file with one image on each")
    return list(found.values())


def context_of(entry: dict, place: str) -> Context:
    """The object on one line as a context."""
    captions, instances = entry.get("captions"), entry.get("instances", [])
    if not isinstance(captions, list) or not captions:
        raise Error(f"{place}: captions: missing, or not a list with captions in it")
    if not isinstance(instances, list) or not all(isinstance(instance, dict) for instance in instances):
        raise Error(f"{place}: instances: must be a list of objects")
    told = [caption(each, f"{place}: captions[{i}]") for i, each in enumerate(captions)]
    boxes = [
        {"category": text(each.get("category"), f"{at}.category"), "bbox": corners(each.get("bbox"), at)}
        for each, at in ((each, f"{place}: instances[{i}]") for i, each in enumerate(instances))
    ]
    number = entry.get("id")
    name = number if isinstance(number, int) and not isinstance(number, bool) else text(number, f"{place}: id")
    return Context(name_of(name), text(entry.get("image"), f"{place}: image"), told, boxes)


# ---------------------------------------------------------------- fields


def name_of(number: int | str) -> str:
    """An image's id as records have it: 12 digits where it is a number."""
    digits = str(number)
    return f"{int(digits):012d}" if digits.isdecimal() and len(digits) < 100 else digits


def corners(box: object, place: str) -> list[float]:
    """Corners as they are printed, with at most 3 decimals."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise Error(f"{place}: bbox: give four numbers, [x1, y1, x2, y2]")
    if not all(-OUTSIDE <= value <= 1 + OUTSIDE for value in box):
        raise Error(f"{place}: bbox {box} is not inside of its image; divide by the image's true width and height")
    return [round(value, 3) + 0.0 for value in box]  # + 0.0 makes -0.0 a 0.0


def is_number(value: object) -> bool:
    """Whether it is a number that can be reckoned with: JSON can hold NaN, and whole numbers too large for a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def caption(value: object, place: str) -> str:
    """A caption on one line."""
    found = " ".join(text(value, place).splitlines())
    if IMAGE_TOKEN in found:
        raise Error(f"{place}: holds {IMAGE_TOKEN}, which stands for a picture in records; write it otherwise")
    return found


def text(value: object, place: str) -> str:
    """A text that is not empty and can be written to a file."""
    if not isinstance(value, str) or not value.strip():
        raise Error(f"{place}: missing, empty, or not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Error(f"{place}: holds half of a character ({first_line(error)}); write it anew") from error
    return value
