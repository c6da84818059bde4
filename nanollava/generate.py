"""The model answers: logits become tokens, tokens text, and questions and answers a conversation (LLaVA section 4).

There is one loop, ``decode``: all prompts go through the network once, side by side, and from then on one token each.
Batches (``generate``), streams (``stream``) and conversations (``Chat``) are views of it, so they cannot differ.

Shapes: B batch, T positions of the longest prompt, M images, S image side, D language width, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nanollava.attention import Mask
from nanollava.conversation import Message, encode, get_template
from nanollava.error import Error, first_line
from nanollava.images import open_image, preprocess, upright
from nanollava.llama import Cache
from nanollava.llava import NO_PATCH, Llava, pad
from nanollava.tokenizer import IMAGE_TOKEN, Tokenizer, need_tokenizer

EOS_ID = 2  # </s> of every LLaMA vocabulary, for models that come without a tokenizer
INCOMPLETE = "\ufffd"  # how a tokenizer shows bytes that are not yet a whole character


# ---------------------------------------------------------------- logits become tokens


@dataclass(frozen=True)
class Sampling:
    """How each next token is chosen. Raises Error on values that make no sense."""

    temperature: float = 0.0  # 0: always the most likely token (greedy); 1: drawn with the model's own probabilities
    top_p: float = 1.0  # draw among the most likely tokens that together reach this probability
    top_k: int = 0  # draw among this many of the most likely tokens; 0: among all
    max_new_tokens: int = 512
    seed: int | None = None  # the same seed draws the same answer again; None: another one each time

    def __post_init__(self):
        for name in ("temperature", "top_p"):
            self._require(name, isinstance(getattr(self, name), int | float), "a number")
        for name in ("top_k", "max_new_tokens", "seed"):
            optional = name == "seed" and self.seed is None
            self._require(name, optional or isinstance(getattr(self, name), int), "a whole number")
        self._require("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._require("top_k", self.top_k >= 0, "0 (all tokens) or more")
        self._require("max_new_tokens", self.max_new_tokens >= 1, "1 or more")
        self._require("seed", self.seed is None or 0 <= self.seed < 2**63, "0 or more, and below 2^63")

    def _require(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise Error(f"{name} is {getattr(self, name)}: it must be {expected}")


GREEDY = Sampling()


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """(B, V) logits -> (B,) token ids. top_k counts before top_p, as is usual."""
    if sampling.temperature < torch.finfo(torch.float32).tiny:  # 0, or what float32 takes for it
        return logits.argmax(dim=-1)
    logits, ids = logits.float().sort(dim=-1, descending=True, stable=True)
    logits = (logits - logits[:, :1]) / sampling.temperature  # the largest becomes 0, so that nothing overflows
    if sampling.top_k:
        logits[:, sampling.top_k :] = -math.inf
    p = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        likelier = p.cumsum(dim=-1) - p  # the probability of all tokens before this one
        p[:, 1:] = p[:, 1:].masked_fill(likelier[:, 1:] >= sampling.top_p, 0)  # the first one always stays
    return ids.gather(1, torch.multinomial(p, 1, generator=generator)).squeeze(1)


# ---------------------------------------------------------------- tokens become text


class Answer:
    """One answer in the making: its token ids, and as much of its text as later tokens cannot change.

    room: the number of tokens after which it is done, whatever they are.
    stop: the text that ends it, besides the end token; neither belongs to the answer's text.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: str | None, room: int):
        self.tokenizer, self.stop, self.room = tokenizer, stop, room
        self.ids: list[int] = []
        self.done = False

    def add(self, token: int) -> None:
        """Take in the next token; behind the end nothing counts any more."""
        if self.done:
            return
        if token == (self.tokenizer.eos_id if self.tokenizer else EOS_ID):
            self.done = True
            return
        self.ids.append(token)
        # The stop text may be spread over several tokens, so it is looked for in the text.
        stopped = self.stop is not None and self.stop in need_tokenizer(self.tokenizer).decode(self.ids)
        self.done = stopped or len(self.ids) == self.room

    @property
    def text(self) -> str:
        """The text so far, without space around it. It only ever grows.

        Held back until they are decided: bytes of an unfinished character, what may become the stop text, white space.
        """
        text = need_tokenizer(self.tokenizer).decode(self.ids)
        if self.stop is not None:
            text = text.partition(self.stop)[0]
            text = text if self.done else text[: len(text) - self._begun(text)]
        return text.rstrip(INCOMPLETE).strip()

    def _begun(self, text: str) -> int:
        """How many characters at the end of the text are a beginning of the stop text."""
        return next((n for n in range(len(self.stop) - 1, 0, -1) if text.endswith(self.stop[:n])), 0)


# ---------------------------------------------------------------- the loop


@torch.inference_mode()
def decode(
    model: Llava, prompts: list[list[int]], pixels: Tensor | None, sampling: Sampling, stop: str | None
) -> Iterator[list[Answer]]:
    """After each new token the B answers so far, until all are done; arguments and errors of ``generate``.

    Prompts are padded on the left, so that all of them end, and are continued, at the same place.
    """
    ids, patches = model.splice_rows(prompts, 0 if pixels is None else len(pixels))
    answers = [Answer(model.tokenizer, stop, _room(model, len(row), sampling)) for row in ids]
    padding = max(map(len, ids)) - torch.tensor([len(row) for row in ids], device=model.device)  # (B,)
    capacity = max(map(len, ids)) + max(answer.room for answer in answers)
    cache = Cache(model.language.config, len(ids), capacity, model.device, model.language.embed_tokens.weight.dtype)
    positions = torch.arange(capacity, device=model.device) - padding[:, None]  # (B, capacity), 0 at the first token
    documents = -(positions < 0).int() if padding.any() else None  # padding is a document of its own, number -1
    generator = None if sampling.seed is None else torch.Generator(model.device).manual_seed(sampling.seed)

    x = _embed(model, ids, patches, pixels)  # (B, T, D), later (B, 1, D)
    while True:
        start, end = cache.length, cache.length + x.shape[1]
        mask = Mask(offset=start, documents=None if documents is None else documents[:, :end])
        hidden = model.language.hidden(x, positions[:, start:end].clamp(min=0), mask, cache)
        tokens = sample(model.language.lm_head(hidden[:, -1]), sampling, generator)  # (B,)
        for answer, token in zip(answers, tokens.tolist(), strict=True):
            answer.add(token)
        yield answers
        if all(answer.done for answer in answers):
            return
        x = model.language.embed_tokens(tokens).unsqueeze(1)


def _room(model: Llava, length: int, sampling: Sampling) -> int:
    """How many tokens an answer may have behind a prompt of so many positions."""
    most = min(model.config.max_length, model.config.language.max_position_embeddings)  # it was trained on no more
    if not length:
        raise Error("the prompt is empty: it needs at least one token")
    if length >= most:
        problem = f"the conversation takes {length} positions, images included, and the model has {most} for it and"
        raise Error(f"{problem} the answer: make it shorter, or start a new one (/reset in chat.py)")
    return min(sampling.max_new_tokens, most - length)


def _embed(model: Llava, ids: list[list[int]], patches: list[list[int]], pixels: Tensor | None) -> Tensor:
    """Spliced rows -> (B, T, D), padded on the left."""
    columns = (pad(ids, 0, left=True).to(model.device), pad(patches, NO_PATCH, left=True).to(model.device))
    return model.embed(*columns, None if pixels is None else pixels.to(model.device))


# ---------------------------------------------------------------- one view of it for each use


def generate(
    model: Llava,
    prompts: list[list[int]],
    pixels: Tensor | None = None,
    sampling: Sampling = GREEDY,
    template: str | None = None,
) -> list[Answer]:
    """Answers to B prompts at once, each with its ``ids`` and ``text``; greedily, the same as one by one.

    prompts: token ids from ``encode``, IMAGE_TOKEN_ID for each image; their lengths may differ.
    pixels: (M, 3, S, S), the images of all prompts in reading order.
    template: whose stop text ends an answer; None is the model's own.
    An answer ends at the end token, the stop text, ``max_new_tokens``, or the last position that the model knows.
    Raises Error on an empty prompt, one that leaves no position free, or more or fewer placeholders than images.
    """
    if not prompts:
        return []
    *_, answers = decode(model, prompts, pixels, sampling, get_template(template or model.config.template).stop)
    return answers


def stream(model: Llava, prompt: list[int], pixels: Tensor | None = None, sampling: Sampling = GREEDY) -> Iterator[str]:
    """The answer to one prompt in pieces, as soon as each is certain; joined they are the text of ``generate``."""
    shown = 0
    for (answer,) in decode(model, [prompt], pixels, sampling, get_template(model.config.template).stop):
        text = answer.text
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)


def answer(model: Llava, image: str | Path | Image.Image | None, question: str, **sampling: Any) -> str:
    """The answer to one question about one picture (None: no picture); ``sampling``: the fields of Sampling.

    After stage 1 it is the picture's caption, whatever the question. Raises Error as ``Chat`` does.
    """
    return "".join(Chat(model, **sampling).say(question, image))


def pixels_of(model: Llava, image: str | Path | Image.Image) -> Tensor:
    """A picture -> (1, 3, S, S), turned as the camera was held. Raises Error where it cannot be read."""
    if isinstance(image, str | Path):
        image = open_image(image, exif=True)
    elif not isinstance(image, Image.Image):
        raise Error(f"image: a {type(image).__name__}; give a path or a PIL image")
    else:
        try:
            image = upright(image)
            image.load()
        except OSError as error:
            raise Error(f"image: damaged or incomplete ({first_line(error)})") from error
    return preprocess(image, model.config.vision.image_size, model.config.image_aspect_ratio).unsqueeze(0)


class Chat:
    """A conversation: what was said and shown so far goes with every new question (section 4.2, X_instruct).

    model: after stage 1 (``captioner``) it describes the last picture whatever is said, and nothing is remembered.
    sampling: the fields of Sampling.
    messages: the turns so far, as ``encode`` takes them; pixels: their pictures, (1, 3, S, S) each.
    Raises Error where the model has no tokenizer.
    """

    def __init__(self, model: Llava, **sampling: Any):
        self.model, self.sampling = model, Sampling(**sampling)
        self.tokenizer = need_tokenizer(model.tokenizer)
        self.captioner = model.config.template == "plain"  # of stage 1
        self.reset()

    def reset(self, image: str | Path | Image.Image | None = None) -> None:
        """Forget all turns and pictures; the new picture, if any, goes with the next question.

        Raises Error if it cannot be read; then nothing is forgotten.
        """
        waiting = None if image is None else pixels_of(self.model, image)
        self.messages: list[Message] = []
        self.pixels: list[Tensor] = []
        self.waiting: Tensor | None = waiting  # goes with the next question

    def say(self, text: str, image: str | Path | Image.Image | None = None) -> Iterator[str]:
        """Answer, in pieces as they come. Each picture stands in its own turn.

        Left early (closed, or Ctrl-C), the part of the answer that was given becomes the turn's answer; a turn without
        any answer is forgotten, and its picture goes with the next one.
        Raises Error, when the first piece is asked for, on an unreadable picture, an empty text, a conversation that
        became too long, or nothing to caption.
        """
        if image is not None:
            self.waiting = pixels_of(self.model, image)
        before, given = self.messages, ""
        question, pixels = self._question(text), self._pictures()
        template, shown = self.model.config.template, torch.cat(pixels) if pixels else None
        prompt, _ = encode([*before, question], self.tokenizer, template, images=len(pixels))
        try:
            for piece in stream(self.model, prompt, shown, self.sampling):
                given += piece
                yield piece
        finally:
            # A reset or another question in between has made this turn a thing of the past.
            if given and not self.captioner and self.messages is before:
                reply = {"role": "assistant", "content": _without_marks(given)}
                self.messages, self.pixels, self.waiting = [*before, question, reply], pixels, None

    def _question(self, text: str) -> Message:
        """The user's message, with the mark of its picture."""
        if not isinstance(text, str):
            raise Error(f"the question is a {type(text).__name__}; give text")
        if self.captioner and self.waiting is None:
            raise Error("a stage-1 model can only caption: give it an image")
        if not self.captioner and not text.strip():
            raise Error("the question is empty: ask something")
        mark = IMAGE_TOKEN if self.waiting is not None else ""
        return {"role": "user", "content": f"{mark}\n{_without_marks(text)}".strip()}

    def _pictures(self) -> list[Tensor]:
        """The pictures of the conversation with the one that waits."""
        return self.pixels if self.waiting is None else [*self.pixels, self.waiting]


def _without_marks(text: str) -> str:
    """Text in which <image> is just a word: with the space, no picture is looked for."""
    return text.replace(IMAGE_TOKEN, f"{IMAGE_TOKEN[0]} {IMAGE_TOKEN[1:]}")
