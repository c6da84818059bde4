"""A teacher's reply becomes the turns of a record, or a reason why it cannot (LLaVA section 3).

Conversations and reasoning come as blocks between lines of three equals signs,

    Question:
    How many kites are flying?
    ===
    Answer:
    Two kites are visible.

a detailed description as the answer alone; its question is drawn from a list.
"""

import random
import re

from nanollava.instruct.contexts import Context
from nanollava.tokenizer import IMAGE_TOKEN

SEPARATOR = re.compile(r"^[ \t]*={3,}[ \t]*$", re.MULTILINE)
HEADER = re.compile(r"^[ \t]*(question|answer)[ \t]*:[ \t]*", re.IGNORECASE | re.MULTILINE)
MARKS = (IMAGE_TOKEN, "</s>", "ASSISTANT:")  # what the official code takes for pictures, ends and roles
TEXTS = r"(captions?|sentences|descriptions)"  # what the teacher was shown; a picture may show some too
SAYING = (
    r"(say|mention|describe|state|tell|indicate|suggest|note|imply|refer|provide|give|do not|don't|does not|doesn't)"
)
SOURCES = re.compile(
    r"\bbounding box"
    r"|\[[01]?\.\d"
    r"|\b(the|these|its|their|with|at|by|from|box) coordinates\b|\bcoordinates (of|are|is|\(|\[)"  # not the verb
    rf"|\b(given|provided) {TEXTS}\b"
    rf"|\b(the|these) {TEXTS} (also |only |all )?{SAYING}(s|es)?\b"
    rf"|\b(according to|based on|(mentioned|described|stated|given|provided) (in|by)) (the|these) {TEXTS}\b",
    re.IGNORECASE,
)

Turn = tuple[str, str]  # question, answer


class Unusable(Exception):
    """Why a reply cannot become a record."""


def turns_of(kind: str, text: str, cut: bool = False, question: str = "") -> list[Turn]:
    """Questions and answers in a reply; to a detailed description ``question`` is the question.

    cut: whether the reply ends where the teacher had to stop. Raises Unusable with the reason.
    """
    if cut:
        raise Unusable("it was cut off: ask again with more --max-tokens")
    if not text.strip():
        raise Unusable("it is empty")
    check_words(text)
    if kind == "detail":
        if SEPARATOR.search(text) or HEADER.search(text):
            raise Unusable("it has questions or separators where a description alone was asked for")
        return [(question, text.strip())]
    turns = read_blocks(text)
    if kind == "reasoning" and len(turns) > 1:
        raise Unusable(f"it has {len(turns)} questions where one was asked for")
    return turns


def check_words(text: str) -> None:
    """Raises Unusable for what must not stand in a record."""
    if held := [mark for mark in MARKS if mark in text]:
        raise Unusable(f"it holds {held[0]}")
    if found := SOURCES.search(text):
        raise Unusable(f"it speaks of its sources: {found[0]!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable("it holds half of a character") from None


def read_blocks(text: str) -> list[Turn]:
    """The blocks of a conversation as turns."""
    blocks = [block.strip() for block in SEPARATOR.split(text.replace("\r\n", "\n"))]
    blocks = blocks[not blocks[0] : len(blocks) - (not blocks[-1])]  # a separator at either end separates nothing
    texts = [block_text(block, ("question", "answer")[number % 2]) for number, block in enumerate(blocks)]
    if not texts:
        raise Unusable("no Question: where one is due")
    if len(texts) % 2:
        raise Unusable("its last question has no answer")
    return list(zip(texts[::2], texts[1::2], strict=True))


def block_text(block: str, header: str) -> str:
    """What stands behind the header that is due."""
    found = HEADER.match(block)
    if not found:
        raise Unusable(f"no {header.capitalize()}: where one is due")
    body = block[found.end() :].strip()
    if found[1].lower() != header:
        raise Unusable(f"{found[1]}: where {header.capitalize()}: is due")
    if not body:
        raise Unusable(f"an empty {header}")
    if HEADER.search(body):
        raise Unusable("wrong separators: a block with two headers in it; between them a line === is due")
    return body


def record_of(context: Context, kind: str, turns: list[Turn], rng: random.Random) -> dict:
    """Turns as an official record. <image> stands before or after the first question at random (equation 2); ``kind``
    is a field of ours."""
    conversations = []
    for question, answer in turns:
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    form = rng.choice((f"{IMAGE_TOKEN}\n{{}}", f"{{}}\n{IMAGE_TOKEN}"))
    conversations[0]["value"] = form.format(turns[0][0])
    return {"id": context.id, "image": context.image, "conversations": conversations, "kind": kind}
