"""The miniature's teacher: boxes become instruction records, captions stage 1's (LLaVA section 3 and table 1).

Like GPT-4 in the paper, it never sees a pixel. It makes the three kinds of record
in the paper's proportions, 58K conversations : 23K detailed descriptions : 77K of reasoning.
"""

import random

from nanollava.miniature.language import CONVERSATION, REASONING, Question, ask, caption, describe, enumerate_things
from nanollava.miniature.scenes import Scene, Thing

PROPORTIONS = {"conversation": 58, "detail": 23, "reasoning": 77}
BRIEF = (
    "Say briefly what the picture shows.", "What is in the image, in a few words?", "Sum up this picture.",
    "Give a short caption for the image.", "Name what you see.",
)  # fmt: skip


def scene_from_boxes(instances: list[dict], side: float) -> Scene:
    """Boxes [x, y, width, height] with categories such as "large red star" -> the scene: a centre tells the cell."""
    things = []
    for instance in instances:
        x, y, width, height = instance["bbox"]
        column, row = int(3 * (x + width / 2) / side), int(3 * (y + height / 2) / side)
        things.append(Thing(3 * row + column, *instance["category"].split(" ")))
    return Scene(tuple(sorted(things)))


def questions(scene: Scene, kind: str, rng: random.Random) -> list[Question]:
    """The turns of one record of ``kind``: up to three for a conversation, one for the others."""
    if kind == "detail":
        return [describe(scene, rng)]
    if kind == "reasoning":
        return [ask_one(scene, REASONING, rng)]
    turns = [ask_one(scene, CONVERSATION, rng) for _ in range(rng.randint(1, 3))]
    return list({turn.text: turn for turn in turns}.values())


def ask_one(scene: Scene, kinds: tuple[str, ...], rng: random.Random) -> Question:
    """A question of one of ``kinds`` that the scene allows; a kind that is listed n times has n times the chance."""
    for kind in rng.sample(kinds, len(kinds)):
        if question := ask(scene, kind, rng):
            return question
    raise AssertionError("every scene allows a count and a subtraction")


def instruction_records(image_id: int, image: str, scene: Scene, rng: random.Random, count: int) -> list[dict]:
    """``count`` official records about one image. <image> stands before or after the first question at random
    (equation 2); ``encode`` then moves it to the front, as the official code does. ``kind``, ``wordings`` and ``forms``
    are fields of ours: by them the evaluation knows what guessing would answer."""
    records = []
    for number, kind in enumerate(rng.choices(list(PROPORTIONS), PROPORTIONS.values(), k=count)):
        turns = questions(scene, kind, rng)
        first = rng.choice(("<image>\n{}", "{}\n<image>")).format(turns[0].text)
        ours = {"kind": kind, "wordings": [t.wording for t in turns], "forms": [t.form for t in turns]}
        records.append(record(f"{image_id:012d}-{number}", turns, first) | {"image": image} | ours)
    return records


def text_records(scene_id: int, scene: Scene, rng: random.Random, count: int) -> list[dict]:
    """``count`` records without an image: the scene is told in words, then asked about, or, once in five, summed up.
    They are what the miniature's language model learns before it has ever seen anything."""
    in_order = enumerate_things(scene.things, shape_first=rng.random() < 0.5)
    told = describe(scene, rng).answer if rng.random() < 0.5 else in_order
    kinds = rng.choices([*PROPORTIONS, "summary"], [*PROPORTIONS.values(), 40], k=count)
    records = []
    for number, kind in enumerate(kinds):
        summary = Question(kind, "", caption(scene, rng, places=rng.random() < 0.5), {})
        turns = [summary] if kind == "summary" else questions(scene, kind, rng)
        first = f"{told}\n{turns[0].text}".rstrip()
        records.append(record(f"{scene_id:012d}-{number}", turns, first) | {"kind": kind})
    return records


def caption_record(image_id: int, image: str, text: str, rng: random.Random) -> dict:
    """A stage 1 record: a brief question and one of the image's captions."""
    conversations = [{"from": "human", "value": f"{rng.choice(BRIEF)}\n<image>"}, {"from": "gpt", "value": text}]
    return {"id": f"{image_id:012d}", "image": image, "conversations": conversations}


def record(name: str, turns: list[Question], first: str) -> dict:
    """Turns as an official record whose first question reads ``first``."""
    conversations = []
    for turn in turns:
        conversations += [{"from": "human", "value": turn.text}, {"from": "gpt", "value": turn.answer}]
    conversations[0]["value"] = first
    return {"id": name, "conversations": conversations}
