"""What can be said about a scene: captions, questions with their answers, descriptions.

A question and a scene determine the answer word for word: things are named in reading order, and what is asked about
is named as the question names it. Where several steps lead to an answer, it first gives its evidence and says again
what was asked ("Looking for stars, I see a red star. Blue? No."): a decoder has only what stands to the left.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import combinations, permutations

from nanollava.miniature.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, Thing

NUMBERS = ("none", "one", "two", "three")
PERCEPTION = ("colour", "shape", "size", "count", "existence", "place", "relation")
REASONING = ("neighbour", "remaining")
KINDS = PERCEPTION + REASONING
CONVERSATION = (*PERCEPTION, "look")  # "Tell me about the star." is no kind of the test


@dataclass(frozen=True)
class Question:
    """A question and its only right answer, as templates to be filled with ``parts``."""

    kind: str
    wording: str  # the question: "What colour is {it}?"
    form: str  # the answer: "{it} is red." Guessing means: for each wording the form met most often
    parts: dict[str, str]  # {"it": "the small star"}

    @property
    def text(self) -> str:
        return self.wording.format(**self.parts)

    @property
    def answer(self) -> str:
        return fill(self.form, self.parts)


def fill(form: str, parts: dict[str, str]) -> str:
    """An answer's form with its parts, each sentence beginning with a capital letter."""
    return re.sub(r"(^|[.?] )([a-z])", lambda start: start[1] + start[2].upper(), form.format(**parts))


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
    if hidden != "cell" and unmistakable(scene, thing):
        phrases.append(f"the object {PLACES[thing.cell]}")
    return tuple(phrases)


def refer(scene: Scene, thing: Thing, hidden: str, rng: random.Random) -> str:
    """One of the ``references``. As people do, things are mostly called by their bare shape where that is enough."""
    phrases, bare = references(scene, thing, hidden), f"the {thing.shape}"
    return bare if bare in phrases and rng.random() < 0.5 else rng.choice(phrases)


def unmistakable(scene: Scene, thing: Thing) -> bool:
    """Whether the place names the thing for everyone: "at the top" might also mean what stands at the top left."""
    others = [t for t in scene.things if t != thing]
    if PLACES[thing.cell] in ("at the top", "at the bottom"):
        return all(t.row != thing.row for t in others)
    if PLACES[thing.cell] in ("on the left", "on the right"):
        return all(t.column != thing.column for t in others)
    return True


def names(scene: Scene, things: Sequence[Thing], attribute: str = "colour") -> list[str]:
    """Each thing by one attribute and its shape, or by its whole name where another has both: "small blue star"."""
    looks = {t: f"{getattr(t, attribute)} {t.shape}" for t in scene.things}
    return [t.name if list(looks.values()).count(looks[t]) > 1 else looks[t] for t in things]


Candidates = Iterator[tuple[str, str, dict[str, str], str]]  # wording, form, parts, what the answer comes down to


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """A question of ``kind``: first an outcome is drawn from those that the scene allows, then a question that has it,
    so that no outcome is common just because many questions lead to it. None where the scene allows no question."""
    by_outcome: dict[str, list[Question]] = {}
    for wording, form, parts, outcome in CANDIDATES[kind](scene, rng):
        by_outcome.setdefault(outcome, []).append(Question(kind, wording, form, parts))
    return rng.choice(by_outcome[rng.choice(sorted(by_outcome))]) if by_outcome else None


def ask_one_thing(attribute: str, wordings: tuple[str, ...], scene: Scene, rng: random.Random) -> Candidates:
    """What is ``attribute`` of a thing? The answer takes up the words by which the question names it."""
    for thing in scene.things:
        if not references(scene, thing, hidden=attribute):
            continue
        parts = {"it": refer(scene, thing, attribute, rng)}
        value = getattr(thing, attribute)
        told = article(value) if attribute == "shape" else value
        for wording in wordings:
            yield wording, f"{{it}} is {told}.", parts, value


ask_colour = partial(
    ask_one_thing, "colour", ("What colour is {it}?", "Which colour does {it} have?", "Tell me the colour of {it}.")
)
ask_shape = partial(
    ask_one_thing, "shape", ("What shape is {it}?", "What is the shape of {it}?", "Tell me the shape of {it}.")
)
ask_size = partial(ask_one_thing, "size", ("Is {it} large or small?", "What size is {it}?", "How big is {it}?"))


def ask_all(hidden: str, wordings: tuple[str, ...], scene: Scene, rng: random.Random) -> Candidates:
    """All that the question does not say of a thing."""
    for thing in scene.things:
        parts = {"it": refer(scene, thing, hidden, rng)}
        for wording in wordings:
            yield wording, f"{{it}} is {unsaid(thing, parts['it'])}.", parts, str(thing.cell)


def unsaid(thing: Thing, it: str) -> str:
    """What the reference ``it`` does not say of a thing, the place last: who has said how a thing looks finds its place
    more easily. The star is "small, red and at the top", the red object is "a small star at the top"."""
    named, place = it.split(), PLACES[thing.cell]
    place = [] if it.endswith(place) else [place]
    adjectives = [word for word in (thing.size, thing.colour) if word not in named]
    if thing.shape in named:
        return join([*adjectives, *place])
    return " ".join([article(" ".join([*adjectives, thing.shape])), *place])


ask_place = partial(
    ask_all, "cell", ("Where is {it}?", "Where in the picture is {it}?", "In which part of the picture is {it}?")
)
ask_look = partial(ask_all, "", ("What does {it} look like?", "Tell me about {it}.", "Describe {it}."))


def groups(scene: Scene, rng: random.Random) -> Iterator[tuple[str, list[Thing]]]:
    """Plural noun phrases, "red objects", with the things that they fit; as many that fit nothing as that fit."""
    for attribute, values in (("size", SIZES), ("colour", tuple(COLOURS)), ("shape", SHAPES)):
        present = sorted({getattr(t, attribute) for t in scene.things})
        absent = sorted(set(values) - set(present))
        for value in present + rng.sample(absent, min(len(absent), len(present))):
            noun = plural(value) if attribute == "shape" else f"{value} objects"
            yield noun, [t for t in scene.things if getattr(t, attribute) == value]


def plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def ask_count(scene: Scene, rng: random.Random) -> Candidates:
    """The answer says again what is counted, and names it."""
    for what, things in (("objects", scene.things), *groups(scene, rng)):
        number = NUMBERS[len(things)]
        seen = f"{join([article(name) for name in names(scene, things)])}, so {number}" if things else number
        for wording in ("How many {what} are there?", "How many {what} can you see in the picture?"):
            yield wording, f"Looking for {{what}}, I see {seen}.", {"what": what}, number


def ask_existence(scene: Scene, rng: random.Random) -> Candidates:
    """The answer looks for the shape, and compares what it finds. What is absent is often a near miss: colour and shape
    are there, but not together. As many questions of each sort, by colour, size or shape, are answered yes as no."""
    thing = rng.choice(scene.things)
    absent = rng.choice([shape for shape in SHAPES if all(t.shape != shape for t in scene.things)])
    yield from existence(scene, "shape", "", thing.shape)
    yield from existence(scene, "shape", "", absent)
    for attribute, values in (("colour", list(COLOURS)), ("size", SIZES)):
        yield from existence(scene, attribute, getattr(thing, attribute), thing.shape)
        found = {getattr(t, attribute) for t in scene.things if t.shape == thing.shape}
        near = [getattr(t, attribute) for t in scene.things if getattr(t, attribute) not in found]
        far = [value for value in values if value not in found]
        if far:  # a near miss, where there is one, as often as any other
            pool = near if near and rng.random() < 0.5 else far
            yield from existence(scene, attribute, rng.choice(pool), thing.shape)
        yield from existence(scene, attribute, rng.choice(values), absent)


def existence(scene: Scene, attribute: str, value: str, shape: str) -> Candidates:
    """Is there a shape whose ``attribute`` is ``value``? Sizes are part of the wording ("Is there a large {shape}?"),
    colours are not ("Is there {it}?"): who guesses may answer "large" otherwise than "small"."""
    alike = [t for t in scene.things if t.shape == shape]
    verdict = "yes" if any(attribute == "shape" or getattr(t, attribute) == value for t in alike) else "no"
    it = article(f"{value} {shape}".lstrip())
    asked, parts = (f"a {value} {{shape}}", {"shape": shape}) if attribute == "size" else ("{it}", {"it": it})
    seen = join([article(n) for n in names(scene, alike, "size" if attribute == "size" else "colour")] or ["none"])
    found = f", so {verdict}." if attribute == "shape" or not alike else f". {{value}}? {verdict}."
    form, parts = f"Looking for {{what}}, I see {seen}{found}", parts | {"what": plural(shape), "value": value}
    for opening, end in (("Is there ", "?"), ("Is there ", " in the picture?"), ("Can you see ", "?")):
        yield opening + asked + end, form, parts, f"{attribute} {verdict}"


def direction(a: Thing, b: Thing) -> list[str]:
    """How ``a`` lies from ``b``: a step of one cell or more in a column or a row counts."""
    sideways = ["to the left of"] * (a.column < b.column) + ["to the right of"] * (a.column > b.column)
    return sideways + ["above"] * (a.row < b.row) + ["below"] * (a.row > b.row)


OPPOSITE = {"to the left of": "to the right of", "above": "below"}
OPPOSITE |= {b: a for a, b in OPPOSITE.items()}
EITHER = {"to the left of": "to the left or to the right of", "above": "above or below"}
EITHER |= {b: EITHER[a] for a, b in OPPOSITE.items() if a in EITHER}


def ask_relation(scene: Scene, rng: random.Random) -> Candidates:
    """The answer compares the two places, and what it finds with what was asked."""
    for a, b in permutations(scene.things, 2):
        parts = {"a": refer(scene, a, "cell", rng), "b": refer(scene, b, "cell", rng)}
        seen = f"{{a}} is {unsaid(a, parts['a'])}; {{b}} is {unsaid(b, parts['b'])}"
        for way in direction(a, b):
            found = f"{seen}; so {{a}} is {way.removesuffix(' of')}."
            for asked, verdict in ((way, "yes"), (OPPOSITE[way], "no")):
                yield f"Is {{a}} {asked} {{b}}?", f"{found} {asked.removesuffix(' of')}? {verdict}.", parts, verdict
            yield f"Is {{a}} {EITHER[way]} {{b}}?", found, parts, way


def ask_neighbour(scene: Scene, rng: random.Random) -> Candidates:
    """Two steps: find one thing, then another from it, and say what that is."""
    for b in scene.things:
        ways = [(way, a) for a in scene.things if a != b for way in direction(a, b)]
        for way, a in ways:
            if [w for w, _ in ways].count(way) == 1:
                parts = {"way": way, "b": refer(scene, b, "cell", rng)}
                found = f"{{b}} is {unsaid(b, parts['b'])}; {{way}} it is the"
                for wording, known, asked, outcome in (
                    ("What colour is the object {way} {b}?", f"{a.size} {a.shape}", a.colour, a.colour),
                    ("What shape is the object {way} {b}?", f"{a.colour} object", article(a.shape), a.shape),
                    ("Is the object {way} {b} large or small?", f"{a.colour} {a.shape}", a.size, a.size),
                ):
                    yield wording, f"{found} {known}, which is {asked}.", parts, outcome


def ask_remaining(scene: Scene, rng: random.Random) -> Candidates:
    """Take away, see what stays, count it."""
    for what, things in groups(scene, rng):
        stay = [t for t in scene.things if t not in things]
        left, number = join([f"the {name}" for name in names(scene, stay)] or ["nothing"]), NUMBERS[len(stay)]
        form, parts = f"Without the {{what}}, {left} would be left, so {number}.", {"what": what}
        yield "If the {what} were taken away, how many objects would be left?", form, parts, number
        yield "How many objects would be left without the {what}?", form, parts, number


CANDIDATES = {
    "colour": ask_colour, "shape": ask_shape, "size": ask_size, "count": ask_count, "existence": ask_existence,
    "look": ask_look, "place": ask_place, "relation": ask_relation, "neighbour": ask_neighbour,
    "remaining": ask_remaining,
}  # fmt: skip


def caption(scene: Scene, rng: random.Random, places: bool) -> str:
    """One sentence about everything, in any order. Half of them name the shape first: whoever predicts each word from
    those before it learns from "a red star" to find shapes by colours, but not colours by shapes."""
    return enumerate_things(rng.sample(scene.things, len(scene.things)), places, shape_first=rng.random() < 0.5)


def enumerate_things(things: Sequence[Thing], places: bool = True, shape_first: bool = False) -> str:
    """One sentence that names things in the order given: "A small red star at the top.", or "A star at the top that is
    small and red." if the shape comes first."""
    phrases = []
    for thing in things:
        place = f" {PLACES[thing.cell]}" if places else ""
        first, last = (thing.shape, f" that is {thing.size} and {thing.colour}") if shape_first else (thing.name, "")
        phrases.append(article(first) + place + last)
    return join(phrases).capitalize() + "."


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """Five captions, as COCO has them: three that say where things are, two that do not."""
    return [caption(scene, rng, places=i < 3) for i in range(5)]


OPENINGS = {
    "Describe the picture in detail.": "The picture shows {count}.",
    "Give a detailed description of the image.": "The image shows {count}.",
    "Describe everything that you can see in this picture.": "I can see {count} in this picture.",
    "What is in this image? Describe all of it.": "There {be} {count} in this image.",
}


def describe(scene: Scene, rng: random.Random) -> Question:
    """A request for a detailed description, and the description: a sentence for each thing, in reading order."""
    n = len(scene.things)
    request = rng.choice(list(OPENINGS))
    count = "one object" if n == 1 else f"{NUMBERS[n]} objects"
    opening = OPENINGS[request].format(count=count, be="is" if n == 1 else "are")
    sentences = (f"There is {article(thing.name)} {PLACES[thing.cell]}." for thing in scene.things)
    return Question("detail", request, " ".join([opening, *sentences]), {})
