"""The miniature world on disk: PNG files with COCO-style captions and boxes, and the records that the teacher makes.

WORLD/images/{train,val,test}/000000000001.png
WORLD/annotations/{captions,instances}_{train,val,test}.json     as in COCO
WORLD/text.json       conversations without images: for the language model
WORLD/captions.json   brief captions in the official format: stage 1
WORLD/instruct.json, WORLD/instruct_val.json    the three kinds of instruction: stage 2
"""

import json
import random
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nanollava.folder import read_json
from nanollava.miniature.language import captions
from nanollava.miniature.scenes import COLOURS, PIXELS, SHAPES, SIZES, Scene, draw, near_misses, random_scene
from nanollava.miniature.teacher import caption_record, instruction_records, scene_from_boxes, text_records

CATEGORIES = [f"{size} {colour} {shape}" for shape in SHAPES for colour in COLOURS for size in SIZES]
FAMILY = 4  # images that follow each other and differ as little as possible


@dataclass(frozen=True)
class WorldSize:
    train: int  # images; a multiple of FAMILY
    val: int = 600
    test: int = 1_200
    text: int = 8_000  # scenes told in words
    records: int = 8  # for each image, and for each scene told in words, that has two things


def build(folder: Path, size: WorldSize, seed: int = 0) -> None:
    """Draw all pictures and write all files."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for offset, (split, count) in enumerate((("train", size.train), ("val", size.val), ("test", size.test))):
        rng = random.Random(f"{seed} {split}")
        scenes = families(rng, count) if split == "train" else even_counts(rng, split, count)
        write_split(folder, split, scenes, 1 + 10_000_000 * offset, rng)
    train, val = read_split(folder, "train"), read_split(folder, "val")
    write_records(folder / "instruct.json", train, partial(instructions, size.records))
    write_records(folder / "instruct_val.json", val, partial(instructions, size.records))
    write_records(folder / "captions.json", train, brief)
    write_records(folder / "text.json", range(size.text), partial(conversations, size.records))


def families(rng: random.Random, count: int) -> list[Scene]:
    """Scenes for training: each followed by its near misses."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng, "train")
        scenes += [scene, *near_misses(scene, rng, FAMILY - 1)]
    return scenes[:count]


def even_counts(rng: random.Random, split: str, count: int) -> list[Scene]:
    """Scenes with one, two and three things in turn. There are few of one thing, so some are drawn more than once."""
    return [random_scene(rng, split, 1 + i % 3) for i in range(count)]


def write_split(folder: Path, split: str, scenes: list[Scene], first: int, rng: random.Random) -> None:
    """Pictures, captions and boxes of one split; image ids count from ``first``."""
    (folder / "images" / split).mkdir(parents=True, exist_ok=True)
    names = [f"{split}/{first + i:012d}.png" for i in range(len(scenes))]
    with workers() as pool:
        files = [folder / "images" / name for name in names]
        boxes = list(pool.map(draw_to, scenes, files, range(first, first + len(scenes)), chunksize=256))
    images, told, instances = [], [], []
    for i, (scene, name) in enumerate(zip(scenes, names, strict=True)):
        images.append({"id": first + i, "file_name": name, "width": PIXELS, "height": PIXELS})
        for text in captions(scene, rng):
            told.append({"id": len(told) + 1, "image_id": first + i, "caption": text})
        for thing, box in zip(scene.things, boxes[i], strict=True):
            category = CATEGORIES.index(thing.name) + 1
            instances.append({"id": len(instances) + 1, "image_id": first + i, "category_id": category, "bbox": box})
    kinds = [{"id": i + 1, "name": name, "supercategory": name.split(" ")[-1]} for i, name in enumerate(CATEGORIES)]
    annotations = folder / "annotations"
    write_json(annotations / f"captions_{split}.json", {"images": images, "annotations": told})
    boxed = {"images": images, "annotations": instances, "categories": kinds}
    write_json(annotations / f"instances_{split}.json", boxed)


def draw_to(scene: Scene, file: Path, seed: int) -> list[list[float]]:
    """Draw one picture into a file and return its boxes."""
    image, boxes = draw(scene, seed)
    image.save(file)
    return boxes


@dataclass(frozen=True)
class Annotated:
    """What is written about one image: all that a teacher gets to know of it."""

    id: int
    name: str
    captions: list[str]
    scene: Scene  # from its boxes


def read_split(folder: Path, split: str) -> list[Annotated]:
    """The images of a split with their captions, and the scene as its boxes tell it."""
    told = read_json(folder / "annotations" / f"captions_{split}.json")
    boxed = read_json(folder / "annotations" / f"instances_{split}.json")
    kinds = {kind["id"]: kind["name"] for kind in boxed["categories"]}
    texts: dict[int, list[str]] = {}
    instances: dict[int, list[dict]] = {}
    for annotation in told["annotations"]:
        texts.setdefault(annotation["image_id"], []).append(annotation["caption"])
    for box in boxed["annotations"]:
        instances.setdefault(box["image_id"], []).append({"category": kinds[box["category_id"]], "bbox": box["bbox"]})
    return [
        Annotated(i["id"], i["file_name"], texts[i["id"]], scene_from_boxes(instances[i["id"]], i["width"]))
        for i in told["images"]
    ]


def instructions(count: int, image: Annotated) -> list[dict]:
    rng = random.Random(f"instruct {image.id}")
    return instruction_records(image.id, image.name, image.scene, rng, records_for(image.scene, count))


def records_for(scene: Scene, count: int) -> int:
    """The more there is to see, the more is asked: ``count`` records about two things, half as many about one, half as
    many again about three."""
    return max(1, count * len(scene.things) // 2)


def brief(image: Annotated) -> list[dict]:
    """Stage 1's record, about one of the captions: some say where things are, some do not."""
    rng = random.Random(f"brief {image.id}")
    return [caption_record(image.id, image.name, rng.choice(image.captions), rng)]


def conversations(count: int, number: int) -> list[dict]:
    rng = random.Random(f"text {number}")
    scene = random_scene(rng, "train")
    return text_records(number, scene, rng, records_for(scene, count))


def write_records(file: Path, subjects: Sequence, make: Callable[..., list[dict]]) -> None:
    """The records that ``make`` makes of each subject, in order, as one official file."""
    with workers() as pool:
        write_json(file, [record for records in pool.map(make, subjects, chunksize=256) for record in records])


def workers() -> ProcessPoolExecutor:
    """A process for each core. Ctrl-C is for their parent to answer."""
    return ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")
