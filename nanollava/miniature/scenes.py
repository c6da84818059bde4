"""A small drawn world: one to three coloured things on a sheet of paper.

A scene is a description (which things, where); a picture of it adds what the description leaves open (the exact spot
within a cell, a slight tilt, the paper). Whether a scene is for training, validation or test is a property of its
description, so that no phase of training can meet a test scene, however it came by its own.
"""

import hashlib
import math
import random
from dataclasses import dataclass, replace
from functools import cache

from PIL import Image, ImageDraw

from nanollava.error import Error

SIZES = ("small", "large")
COLOURS = {
    "red": (222, 53, 53), "orange": (246, 140, 31), "yellow": (246, 211, 47), "green": (46, 160, 76),
    "blue": (45, 104, 226), "purple": (138, 68, 190), "pink": (244, 134, 196), "black": (48, 50, 58),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
ATTRIBUTES = (*SIZES, *COLOURS, *SHAPES)
PLACES = (
    "at the top left", "at the top", "at the top right",
    "on the left", "in the centre", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
PAPERS = ((250, 246, 236), (236, 244, 250), (240, 248, 238), (250, 240, 242), (244, 241, 250), (246, 246, 244))
RADIUS = {"small": 0.095, "large": 0.148}  # of the image side
PIXELS = 96  # side of a drawn picture


@dataclass(frozen=True, order=True)
class Thing:
    cell: int  # 0 to 8, row by row
    size: str
    colour: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def row(self) -> int:
        return self.cell // 3

    @property
    def column(self) -> int:
        return self.cell % 3


@dataclass(frozen=True)
class Scene:
    """Things in reading order, each in a cell of its own."""

    things: tuple[Thing, ...]

    @property
    def split(self) -> str:
        """ "train", "val" or "test", from the description alone: 85, 5 and 10 scenes in a hundred."""
        digest = hashlib.blake2b(repr(self.things).encode(), digest_size=8).digest()
        share = int.from_bytes(digest) / 2**64
        return "test" if share < 0.10 else "val" if share < 0.15 else "train"


def make_scene(things: list[Thing]) -> Scene | None:
    """A scene, or None where two things share a cell or look the same."""
    cells, names = {t.cell for t in things}, {t.name for t in things}
    return Scene(tuple(sorted(things))) if len(cells) == len(names) == len(things) else None


def random_scene(rng: random.Random, split: str, count: int | None = None) -> Scene:
    """A scene of ``split`` with ``count`` things (1 to 3, by default any); things often share a colour or a shape."""
    while True:
        n, things = count or rng.randint(1, 3), []
        for _ in range(n):
            thing = Thing(rng.randrange(9), rng.choice(SIZES), rng.choice(list(COLOURS)), rng.choice(SHAPES))
            if things and rng.random() < 0.4:
                shared = rng.choice(("colour", "shape"))
                thing = replace(thing, **{shared: getattr(rng.choice(things), shared)})
            things.append(thing)
        scene = make_scene(things)
        if scene and scene.split == split:
            return scene


def near_misses(scene: Scene, rng: random.Random, count: int) -> list[Scene]:
    """``count`` scenes of the same split that differ from ``scene`` and each other in as little as possible: attributes
    exchanged between two things, one attribute changed, a thing moved. They are what a contrastive tower must tell
    apart, and chance would almost never draw them. (A caption without places fits two that differ in nothing else.)
    Raises Error where there are not so many: a test scene of one thing has few that are test scenes too."""
    found, draws = [scene], 0
    while len(found) <= count:
        draws += 1
        if draws > 1000:
            raise Error(f"{scene} has {len(found) - 1} near misses of its split, not {count}: it has too few things")
        things = list(scene.things)
        what = rng.choice(("size", "colour", "shape", "shape", "cell"))  # shapes are the hardest to tell apart
        i, j = rng.sample(range(len(things)), 2) if len(things) > 1 and rng.random() < 0.5 else (0, None)
        if j is not None:
            a, b = things[i], things[j]
            things[i], things[j] = replace(a, **{what: getattr(b, what)}), replace(b, **{what: getattr(a, what)})
        else:
            i = rng.randrange(len(things))
            values = {"size": SIZES, "colour": list(COLOURS), "shape": SHAPES, "cell": range(9)}[what]
            things[i] = replace(things[i], **{what: rng.choice(values)})
        other = make_scene(things)
        if other and other not in found and other.split == scene.split:
            found.append(other)
    return found[1:]


@cache
def outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape around the origin, y downwards; the areas are within a factor of 1.5."""
    if shape == "circle":
        return polygon(40, 0.96)
    if shape == "square":
        return polygon(4, 1.18, turn=math.pi / 4)
    if shape == "triangle":
        return tuple((x, y + 0.12) for x, y in polygon(3, 1.22))
    if shape == "star":
        tips, notches = polygon(5, 1.22), polygon(5, 0.56, turn=math.pi / 5)
        return tuple((x, y + 0.06) for pair in zip(tips, notches, strict=True) for x, y in pair)
    if shape == "cross":
        a, b = 0.36, 1.05
        quarter = ((a, -b), (a, -a), (b, -a))
        return tuple((x * c - y * s, x * s + y * c) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for x, y in quarter)
    return heart(40)


def heart(corners: int) -> tuple[tuple[float, float], ...]:
    angles = [2 * math.pi * i / corners for i in range(corners)]
    ys = [-13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t) for t in angles]
    return tuple((16 * math.sin(t) ** 3 / 15, y / 15) for t, y in zip(angles, ys, strict=True))


def polygon(corners: int, radius: float, turn: float = 0.0) -> tuple[tuple[float, float], ...]:
    """A regular polygon, its first corner at the top."""
    angles = [2 * math.pi * i / corners - math.pi / 2 + turn for i in range(corners)]
    return tuple((radius * math.cos(a), radius * math.sin(a)) for a in angles)


def place_thing(thing: Thing, rng: random.Random) -> list[tuple[float, float]]:
    """Corners of a thing in a picture of side 1: about the middle of its cell, slightly tilted. The tips of a large one
    may reach a little over the edge of the cell, and so of the picture."""
    radius = RADIUS[thing.size] * rng.uniform(0.93, 1.05)
    room = 1 / 6 - radius * 1.05
    x = (thing.column + 0.5) / 3 + rng.uniform(-room, room)
    y = (thing.row + 0.5) / 3 + rng.uniform(-room, room)
    tilt = rng.uniform(-0.2, 0.2)
    cos, sin = radius * math.cos(tilt), radius * math.sin(tilt)
    return [(x + cos * u - sin * v, y + sin * u + cos * v) for u, v in outline(thing.shape)]


@cache
def paper(colour: tuple[int, int, int], side: int) -> Image.Image:
    """A sheet that darkens a little towards its lower edge."""
    column = Image.new("RGB", (1, side))
    for y in range(side):
        column.putpixel((0, y), tuple(round(c * (1 - 0.07 * y / side)) for c in colour))
    return column.resize((side, side))


def draw(scene: Scene, seed: int, side: int = PIXELS) -> tuple[Image.Image, list[list[float]]]:
    """(picture of side x side pixels, one box [x, y, width, height] in pixels for each thing)."""
    rng, big, boxes = random.Random(seed), 3 * side, []
    image = paper(rng.choice(PAPERS), big).copy()
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        corners, colour = place_thing(thing, rng), COLOURS[thing.colour]
        canvas.polygon([((x + 0.012) * big, (y + 0.016) * big) for x, y in corners], fill=(205, 200, 195))
        edge = tuple(round(0.72 * c) for c in colour)
        canvas.polygon([(x * big, y * big) for x, y in corners], fill=colour, outline=edge, width=max(1, big // 110))
        xs, ys = [side * x for x, _ in corners], [side * y for _, y in corners]
        boxes.append([round(v, 2) for v in (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))])
    return image.resize((side, side), Image.Resampling.BOX), boxes
