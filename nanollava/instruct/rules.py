"""The rule-based teacher: it knows the miniature world and nothing else, and needs neither network nor key.

It reads the boxes and writes as an endpoint would, so that whatever comes behind cannot tell the two apart.
"""

import random

from nanollava.error import Error
from nanollava.instruct.teacher import Reply, Request, Teacher
from nanollava.miniature.scenes import COLOURS, SHAPES, SIZES, Scene, make_scene
from nanollava.miniature.teacher import PROPORTIONS, questions, scene_from_boxes

REMEDY = "for all else give --teacher endpoint, or the FOLDER of a language model"


class RuleTeacher(Teacher):
    """The same key and boxes get the same reply. Tokens are not counted: they cost nothing."""

    name = "miniature"

    def ask(self, request: Request) -> Reply:
        """Raises Error for anything but the three kinds of instruction about a scene of the miniature world."""
        if request.kind not in PROPORTIONS:
            raise Error(f"the miniature teacher knows {', '.join(PROPORTIONS)}, not {request.kind!r}; {REMEDY}")
        turns = questions(scene_of(request), request.kind, random.Random(f"rules {request.key}"))
        if request.kind == "detail":
            return Reply(turns[0].answer, 0, 0)
        blocks = [f"Question:\n{turn.text}\n===\nAnswer:\n{turn.answer}" for turn in turns]
        return Reply("\n===\n".join(blocks), 0, 0)


def scene_of(request: Request) -> Scene:
    """The scene that the boxes of a request tell. Raises Error where they are none of the miniature world."""
    context = request.context
    instances = context.instances if context else []
    names = [instance["category"] for instance in instances]
    if odd := [name for name in names if not is_drawn(name)]:
        raise Error(f"{request.key}: the miniature teacher knows only the drawn world, and no {odd[0]!r}; {REMEDY}")
    scene = scene_from_boxes([{**i, "bbox": from_corners(i["bbox"])} for i in instances], side=1)
    if not 1 <= len(names) <= 3 or not make_scene(list(scene.things)) or not in_sight(scene):
        raise Error(f"{request.key}: its boxes are no scene of the drawn world: one to three things apart; {REMEDY}")
    return scene


def is_drawn(name: str) -> bool:
    """Whether a category is one of the miniature world's, such as "large red star"."""
    words = name.split(" ")
    return len(words) == 3 and words[0] in SIZES and words[1] in COLOURS and words[2] in SHAPES


def in_sight(scene: Scene) -> bool:
    return all(0 <= thing.cell <= 8 for thing in scene.things)


def from_corners(box: list[float]) -> list[float]:
    """[x1, y1, x2, y2] -> [x, y, width, height]."""
    x1, y1, x2, y2 = box
    return [x1, y1, x2 - x1, y2 - y1]
