"""What can be said about a scene: captions, questions with their answers, descriptions; and descriptions read back.

The form of an answer depends on the wording of its question alone, so every question has exactly one right answer.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

from nanollava.miniature.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, Thing

NUMBERS = ("none", "one", "two", "three")
PERCEPTION = ("colour", "shape", "size", "count", "existence", "place", "relation")
REASONING = ("neighbour", "remaining")
KINDS = PERCEPTION + REASONING


@dataclass(frozen=True)
class Question:
    kind: str
    wording: str  # the text with its variable parts left out: guessing is measured for each of these
    text: str
    answer: str


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def join(phrases: list[str]) -> str:
    """a, b and c"""
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


@lru_cache(maxsize=1024)
def references(scene: Scene, thing: Thing, hidden: str) -> tuple[str, ...]:
    """Every noun phrase that fits ``thing`` alone and does not mention the attribute ``hidden``."""
    attributes = [name for name in ("size", "colour", "shape") if name != hidden]
    phrases = []
    for n in range(len(attributes) + 1):
        for shown in combinations(attributes, n):
            if sum(all(getattr(t, a) == getattr(thing, a) for a in shown) for t in scene.things) == 1:
                words = [getattr(thing, a) for a in shown if a != "shape"]
                phrases.append(" ".join(["the", *words, thing.shape if "shape" in shown else "object"]))
    if hidden != "cell":
        phrases.append(f"the object {PLACES[thing.cell]}")
    return tuple(phrases)


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """A question of ``kind``: first an answer is drawn from those that the scene allows, then a question that has it,
    so that no answer is common just because many questions lead to it. None where the scene allows no question."""
    by_answer: dict[str, list[tuple[str, dict, str]]] = {}
    for wording, parts, answer in CANDIDATES[kind](scene, rng):
        by_answer.setdefault(answer, []).append((wording, parts, answer))
    if not by_answer:
        return None
    wording, parts, answer = rng.choice(by_answer[rng.choice(sorted(by_answer))])
    return Question(kind, wording, wording.format(**parts), answer)


Candidates = Iterator[tuple[str, dict, str]]


def ask_colour(scene: Scene, rng: random.Random) -> Candidates:
    for thing in scene.things:
        it = rng.choice(references(scene, thing, hidden="colour"))
        yield "What colour is {it}?", {"it": it}, f"It is {thing.colour}."
        yield "Which colour does {it} have?", {"it": it}, f"It is {thing.colour}."
        yield "Tell me the colour of {it}.", {"it": it}, f"It is {thing.colour}."


def ask_shape(scene: Scene, rng: random.Random) -> Candidates:
    for thing in scene.things:
        it = rng.choice(references(scene, thing, hidden="shape"))
        yield "What shape is {it}?", {"it": it}, f"It is a {thing.shape}."
        yield "What is the shape of {it}?", {"it": it}, f"It is a {thing.shape}."
        yield "What kind of object is {it}?", {"it": it}, f"It is a {thing.shape}."


def ask_size(scene: Scene, rng: random.Random) -> Candidates:
    for thing in scene.things:
        it = rng.choice(references(scene, thing, hidden="size"))
        yield "Is {it} large or small?", {"it": it}, f"It is {thing.size}."
        yield "What size is {it}?", {"it": it}, f"It is {thing.size}."
        yield "How big is {it}?", {"it": it}, f"It is {thing.size}."


def groups(scene: Scene, rng: random.Random) -> Iterator[tuple[str, list[Thing]]]:
    """Plural noun phrases, "red objects", with the things that they fit; as many that fit nothing as that fit."""
    for attribute, values in (("size", SIZES), ("colour", tuple(COLOURS)), ("shape", SHAPES)):
        present = sorted({getattr(t, attribute) for t in scene.things})
        absent = sorted(set(values) - set(present))
        for value in present + rng.sample(absent, min(len(absent), len(present))):
            noun = f"{value}s" if attribute == "shape" else f"{value} objects"
            noun = noun.replace("crosss", "crosses")
            yield noun, [t for t in scene.things if getattr(t, attribute) == value]


def ask_count(scene: Scene, rng: random.Random) -> Candidates:
    n = len(scene.things)
    total = "There is one." if n == 1 else f"There are {NUMBERS[n]}."
    yield "How many objects are there?", {}, total
    yield "How many objects can you see in the picture?", {}, total
    for noun, things in groups(scene, rng):
        answer = "There is one." if len(things) == 1 else f"There are {NUMBERS[len(things)]}."
        yield "How many {what} are there?", {"what": noun}, answer
        yield "How many {what} can you see in the picture?", {"what": noun}, answer


def ask_existence(scene: Scene, rng: random.Random) -> Candidates:
    """The absent thing is often made of a colour and a shape that are both there, but not together."""
    thing = rng.choice(scene.things)
    colours, shapes = [t.colour for t in scene.things], [t.shape for t in scene.things]
    pairs = [(rng.choice(colours), rng.choice(SHAPES)), (rng.choice(list(COLOURS)), rng.choice(shapes))]
    pairs += [(rng.choice(colours), rng.choice(shapes)) for _ in range(2)]
    absent = [p for p in pairs if p not in zip(colours, shapes, strict=True)]
    yes = [f"{thing.colour} {thing.shape}", f"{thing.size} {thing.shape}", thing.shape]
    no = [" ".join(p) for p in absent]
    no += [f"{size} {shape}" for size in SIZES for shape in shapes if (size, shape) not in {(t.size, t.shape) for t in scene.things}]  # fmt: skip  # noqa: E501
    no += [shape for shape in rng.sample(SHAPES, 2) if shape not in shapes]
    for nouns, first, second in ((yes, "Yes, there is.", "Yes, I can."), (no, "No, there is not.", "No, I can not.")):
        noun = article(rng.choice(nouns)) if nouns else None
        if noun:
            yield "Is there {what}?", {"what": noun}, first
            yield "Is there {what} in the picture?", {"what": noun}, first
            yield "Can you see {what}?", {"what": noun}, second


def ask_place(scene: Scene, rng: random.Random) -> Candidates:
    for thing in scene.things:
        it = rng.choice(references(scene, thing, hidden="cell"))
        yield "Where is {it}?", {"it": it}, f"It is {PLACES[thing.cell]}."
        yield "Where in the picture is {it}?", {"it": it}, f"It is {PLACES[thing.cell]}."
        yield "In which part of the picture can {it} be found?", {"it": it}, f"It is {PLACES[thing.cell]}."


def direction(a: Thing, b: Thing) -> list[str]:
    """How ``a`` lies from ``b``: a step of one cell or more in a column or a row counts."""
    sideways = ["to the left of"] * (a.column < b.column) + ["to the right of"] * (a.column > b.column)
    return sideways + ["above"] * (a.row < b.row) + ["below"] * (a.row > b.row)


OPPOSITE = {"to the left of": "to the right of", "above": "below"}
OPPOSITE |= {b: a for a, b in OPPOSITE.items()}


def ask_relation(scene: Scene, rng: random.Random) -> Candidates:
    pairs = [(a, b) for a in scene.things for b in scene.things if a != b]
    for a, b in pairs:
        words = {"a": rng.choice(references(scene, a, "cell")), "b": rng.choice(references(scene, b, "cell"))}
        for way in direction(a, b):
            yield "Is {a} {way} {b}?", words | {"way": way}, "Yes, it is."
            yield "Is {a} {way} {b}?", words | {"way": OPPOSITE[way]}, "No, it is not."
            if way in ("above", "below"):
                yield "Is {a} above or below {b}?", words, f"It is {way} it."
            else:
                yield "Is {a} to the left or to the right of {b}?", words, f"It is {way} it."


def ask_neighbour(scene: Scene, rng: random.Random) -> Candidates:
    """Two steps: find one thing from another, then say what it is."""
    for b in scene.things:
        ways = [(way, a) for a in scene.things if a != b for way in direction(a, b)]
        for way, a in ways:
            if [w for w, _ in ways].count(way) == 1:
                parts = {"way": way, "b": rng.choice(references(scene, b, "cell"))}
                it = f"That is the {a.colour} {a.shape}, so it is"
                yield "What colour is the object {way} {b}?", parts, f"{it} {a.colour}."
                yield "What shape is the object {way} {b}?", parts, f"{it} a {a.shape}."
                yield "Is the object {way} {b} large or small?", parts, f"{it} {a.size}."


def ask_remaining(scene: Scene, rng: random.Random) -> Candidates:
    """Count, count those that go, subtract."""
    n = len(scene.things)
    for noun, things in groups(scene, rng):
        left = n - len(things)
        verb = "is" if n == 1 else "are"
        answer = f"There {verb} {NUMBERS[n]} and {NUMBERS[len(things)]} would go, so {NUMBERS[left]} would be left."
        yield "If the {what} were taken away, how many objects would be left?", {"what": noun}, answer
        yield "How many objects would be left without the {what}?", {"what": noun}, answer


CANDIDATES = {
    "colour": ask_colour, "shape": ask_shape, "size": ask_size, "count": ask_count, "existence": ask_existence,
    "place": ask_place, "relation": ask_relation, "neighbour": ask_neighbour, "remaining": ask_remaining,
}  # fmt: skip


def caption(scene: Scene, rng: random.Random, places: bool = True) -> str:
    """One sentence about everything, in any order, with or without places."""
    things = rng.sample(scene.things, len(scene.things))
    phrases = [article(t.name) + (f" {PLACES[t.cell]}" if places else "") for t in things]
    return join(phrases).capitalize() + "."


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """Five captions, as COCO has them: three that say where things are, two that do not."""
    return [caption(scene, rng, places=i < 3) for i in range(5)]


OPENINGS = {
    "Describe the picture in detail.": "The picture shows {count}.",
    "Give a detailed description of the image.": "The image shows {count}.",
    "Explain everything that you can see in this picture.": "I can see {count} in this picture.",
    "What is in this image? Describe all of it.": "There {be} {count} in this image.",
}


def describe(scene: Scene, rng: random.Random) -> Question:
    """A request for a detailed description, and the description: a sentence for each thing, in reading order."""
    n = len(scene.things)
    request = rng.choice(list(OPENINGS))
    count = "one object" if n == 1 else f"{NUMBERS[n]} objects"
    opening = OPENINGS[request].format(count=count, be="is" if n == 1 else "are")
    return Question("detail", request, request, " ".join([opening, *map(placed, scene.things)]))


def placed(thing: Thing) -> str:
    """One thing and its place as a sentence."""
    return f"There is {article(thing.name)} {PLACES[thing.cell]}."


NAME = rf"\b({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b"
PLACED = re.compile(rf"{NAME} ({'|'.join(PLACES)})(?=[.,]| and|$)")


def parse_description(text: str) -> list[Thing]:
    """The things that a description or caption with places names, duplicates kept, in the order of the text."""
    return [Thing(PLACES.index(place), *name) for *name, place in PLACED.findall(text)]


def parse_names(text: str) -> list[tuple[str, str, str]]:
    """(size, colour, shape) of every thing named in a caption, with or without a place."""
    return re.findall(NAME, text.lower())
