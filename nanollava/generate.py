"""The model answers: logits become tokens, tokens text, and questions and answers a conversation (LLaVA section 4).

There is one loop, ``decode``: all prompts go through the network once, side by side, and from then on one token each.
The first pass is called prefill: each weight that is read serves hundreds of positions, so arithmetic limits it. In the
passes behind it each weight serves one position, so memory limits them, and what makes one kind faster does little for
the other.

Batches (``generate``), streams (``stream``) and conversations (``Chat``) are views of it, so they cannot differ.

Shapes: B batch, T positions of the longest prompt, M images, S image side, D language width, V vocabulary.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nanollava.attention import asked
from nanollava.conversation import Message, encode, get_template
from nanollava.decoding import FixedCache, next_logits
from nanollava.error import Error, first_line
from nanollava.images import open_image, preprocess, upright
from nanollava.llama import Cache
from nanollava.llava import NO_PATCH, Llava, pad
from nanollava.sampling import GREEDY, Sampling, sample
from nanollava.tokenizer import IMAGE_TOKEN, Tokenizer, need_tokenizer

EOS_ID = 2  # </s> of every LLaMA vocabulary, for models that come without a tokenizer
INCOMPLETE = "\ufffd"  # how a tokenizer shows bytes that are not yet a whole character


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
    _check_types(prompts, pixels)
    ids, patches = model.splice_rows(prompts, 0 if pixels is None else len(pixels))
    answers = [Answer(model.tokenizer, stop, _room(model, len(row), sampling)) for row in ids]
    longest = max(map(len, ids))
    padding = longest - torch.tensor([len(row) for row in ids], device=model.device)  # (B,)
    padding = padding if padding.any() else None
    capacity = longest + max(answer.room for answer in answers)
    cache = Cache(model.language.config, len(ids), capacity, model.device, model.language.embed_tokens.weight.dtype)
    generator = None if sampling.seed is None else torch.Generator(model.device).manual_seed(sampling.seed)

    logits = next_logits(model.language, _embed(model, ids, patches, pixels), cache, padding)
    step = next_logits
    if model.step is not None and asked.maps is None:  # maps are of plain execution
        step, cache = model.step, FixedCache(cache)
    while True:
        tokens = sample(logits, sampling, generator)  # (B,)
        for answer, token in zip(answers, tokens.tolist(), strict=True):
            answer.add(token)
        yield answers
        if all(answer.done for answer in answers):
            return
        logits = step(model.language, model.language.embed_tokens(tokens).unsqueeze(1), cache, padding)


def _check_types(prompts: list[list[int]], pixels: Tensor | None) -> None:
    """Raises Error for what looks much alike, but is not what ``generate`` takes."""
    if not isinstance(prompts, list) or not all(isinstance(row, list) for row in prompts):
        raise Error("prompts: give a list of lists of token ids, as encode() makes them (tensor.tolist() of a tensor)")
    if not isinstance(pixels, Tensor | None):
        raise Error(f"pixels: a {type(pixels).__name__}; give one tensor (M, 3, S, S), torch.stack() of several")


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
    Raises Error on other types, an empty prompt, one that leaves no position free, or a wrong number of placeholders.
    """
    _check_types(prompts, pixels)
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
