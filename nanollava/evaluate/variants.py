"""What the paper's ablations change, as variants of the miniature: the records, the order within an answer, the
projector, the tower's layer, the language model.

Visual Instruction Tuning, table 4 (kinds of instruction data) and table 8 (design choices); LLaVA-1.5 (the MLP).
"""

import random
import re
from dataclasses import dataclass, replace

from nanollava.evaluate.miniature import Item, verdict
from nanollava.miniature.language import Question, fill

KEPT = {  # records of stage 2: which share of each kind stays
    "all": {"conversation": 1, "detail": 1, "reasoning": 1},
    "detail+reasoning": {"conversation": 0, "detail": 1, "reasoning": 1},
    "mostly-conversation": {"conversation": 1, "detail": 0.05, "reasoning": 0.1},
    "conversation": {"conversation": 1, "detail": 0, "reasoning": 0},
}
TURNED = "answer-first"  # or all of them, each answer with its conclusion in front


@dataclass(frozen=True)
class Variant:
    name: str  # in --only, and of its folders
    title: str  # in tables
    differs: str = ""  # between miniature and paper, known beforehand: what may explain another outcome
    records: str | None = "all"  # of stage 2: of KEPT, or TURNED; None: no stage 2
    stage1: bool = True
    projector: str = "mlp2x_gelu"  # the miniature's
    layer: int = -2  # the paper's
    half: bool = False  # the language model

    @property
    def start(self) -> str:
        """The name of the stage 1 that it goes on from: variants that differ in stage 2 alone share it."""
        changed = {"linear": self.projector == "linear", "last-layer": self.layer == -1, "half-size": self.half}
        return "-".join(["stage1", *(name for name, holds in changed.items() if holds)])


KNOWN = (
    "the miniature's Vicuna has learnt all three kinds of answer from scenes told in words before it sees any; and the "
    "test asks in the wordings of the training, each with one right answer, where the paper's judge grades free answers"
)
VARIANTS = {  # in the order of training: two side by side take about the same time
    variant.name: variant
    for variant in (
        Variant("all", "all kinds, the miniature's recipe"),
        Variant(
            "last-layer", "the tower's last layer",
            "the paper supposes that the last layer tells of the whole picture more than of its places; this tower has "
            "4 blocks, and 9 patches, one for each place, where CLIP's has 24 and 256",
            layer=-1,
        ),
        Variant(
            TURNED, "answer first, then its reasons",
            "the miniature's Vicuna has learnt to give its reasons first; and a decoder of four layers that answers at "
            "once has no words of its own to look things up in, where the paper's has 40 layers and knows the subject",
            TURNED,
        ),
        Variant(
            "no-stage1", "no stage 1",
            "the projector begins on whitened features, as in the miniature's stage 1; and stage 2 here trains a small "
            "model at a high rate, so that it can make up for what it was not given",
            stage1=False,
        ),
        Variant(
            "half-size", "half-size language model",
            "both models are made for this one small world; the paper's 7B and 13B also differ in what they know of "
            "the subjects that are asked about",
            half=True,
        ),
        Variant(
            "linear", "linear projector",
            "whitened features of a small tower may be read by a linear map as well, and the language model is trained "
            "with it",
            projector="linear",
        ),
        Variant("detail+reasoning", "detail and reasoning", KNOWN, "detail+reasoning"),
        Variant("mostly-conversation", "conversation, 5% of detail, 10% of reasoning", KNOWN, "mostly-conversation"),
        Variant("conversation", "conversation only", KNOWN, "conversation"),
        Variant("none", "none (stage 1 only)", KNOWN, None),
    )
}  # fmt: skip


def chosen(records: list[dict], name: str) -> list[dict]:
    """What a variant's stage 2 learns from, of all ``records``. Which records make up a share of less than one depends
    on their ids alone."""
    if name == TURNED:
        return [turned(record) for record in records]
    return [r for r in records if random.Random(f"{name} {r['id']}").random() < KEPT[name][r["kind"]]]


def turned(record: dict) -> dict:
    """A record whose answers give their conclusions first."""
    turns = [
        turn | {"value": conclusion_first(turn["value"])} if turn["from"] == "gpt" else turn
        for turn in record["conversations"]
    ]
    return record | {"conversations": turns}


CONCLUSIONS = (  # how a teacher's answer ends where it gives its evidence first -> the same, turned round
    (r"(?P<evidence>.+)\. (?P<asked>[^.?]+\? )(?P<said>Yes|No)\.", "{asked}{said}. {evidence}."),
    (r"(?P<evidence>.+)[,;] so (?P<said>[^.,;]+)\.", "{said}. {evidence}."),
    (r"(?P<evidence>.+), which is (?P<said>[^.,;]+)\.", "it is {said}. {evidence}."),
    (r"(?P<evidence>Looking for .+, I see (?P<said>none))\.", "{said}. {evidence}."),
)


def conclusion_first(answer: str) -> str:
    """The answer with what it comes down to in front of its evidence: "Looking for stars, I see a red star. Blue? No."
    becomes "Blue? No. Looking for stars, I see a red star." What has no evidence stays as it is."""
    for ending, form in CONCLUSIONS:
        if found := re.fullmatch(ending, answer):
            return fill(form, found.groupdict())
    return answer


def last_verdict(answer: str) -> str:
    """What an answer comes down to that ends in its conclusion, without the words that join that to what precedes."""
    return re.sub(r"^(so|which is|it is|i see) ", "", verdict(answer))


def first_verdict(answer: str) -> str:
    """What an answer comes down to that begins with its conclusion: so the same as before it was turned round."""
    return last_verdict(answer.split(". ")[0])


def turned_item(item: Item) -> Item:
    """The same question, its right answer turned round."""
    question = item.question
    return replace(item, question=Question(question.kind, question.text, conclusion_first(question.answer), {}))
