"""A model answers the questions of a benchmark: in batches, greedily, and a run that was stopped goes on.

Each answer is a line in the official format (question_id, prompt, text, answer_id, model_id, metadata), written as soon
as its batch is there, in the order of the questions.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanollava.checkpoint import load
from nanollava.conversation import encode
from nanollava.error import Error
from nanollava.evaluate.lines import check_resumed
from nanollava.generate import Sampling, generate
from nanollava.images import check_image, open_image, preprocess
from nanollava.instruct.journal import Journal
from nanollava.llava import Llava
from nanollava.progress import minutes
from nanollava.tokenizer import IMAGE_TOKEN
from nanollava.train.features import fingerprint
from nanollava.train.keep import alone

TELL_EVERY = 10  # seconds


@dataclass(frozen=True)
class Asked:
    """One question to the model."""

    id: int | str
    prompt: str  # what is asked, and what the file repeats of it; with an image its mark may stand in front
    image: Path | None


def add_answer_options(parser: argparse.ArgumentParser, longest: int) -> None:
    """What every benchmark that asks a model may be told; ``longest`` answer in tokens."""
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="a LLaVA folder")
    add("--out", type=Path, required=True, help="JSON lines, one for each answer; what is there already is not asked")
    add("--batch-size", type=int, default=8, help="questions at once (8): memory against speed")
    add("--max-new-tokens", type=int, default=longest, help=f"longest answer ({longest})")
    add("--device", help="default: cuda where there is one, otherwise cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on cuda, float32 on cpu")
    add("--vision", type=Path, help="the CLIP folder, where MODEL has no image tower in it")
    add("--base", type=Path, help="the language model that a LoRA or a projector was trained on")


def answer_all(args: argparse.Namespace, asked: list[Asked]) -> None:
    """Answer what ``args.out`` does not answer yet, with the model and the options that ``args`` name.

    Raises Error, before the first answer, where an image is missing, a question leaves the model no room, or the file
    holds answers of another model, to other questions or made otherwise, or another run writes to it.
    """
    sampling = Sampling(max_new_tokens=args.max_new_tokens)
    if args.batch_size < 1:
        raise Error(f"--batch-size {args.batch_size}: give 1 or more")
    check_images(asked)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model = load(args.model, device, dtype, args.vision, args.base)
    made_by = {"model_id": args.model.resolve().name, "metadata": how(model, sampling)}
    with alone(args.out), Journal(args.out) as journal:
        check_resumed(args.out, journal.done, {str(a.id): made_by | {"prompt": a.prompt} for a in asked})
        waiting = [a for a in asked if str(a.id) not in journal.done]
        for a, text in answers(model, waiting, args.batch_size, sampling):
            fields = {"question_id": a.id, "prompt": a.prompt, "text": text, **made_by}
            journal.append(str(a.id), **fields, answer_id=digest(fields))
    print(f"{args.out}: {len(asked):,} answers, {len(waiting):,} of them new", file=sys.stderr)


def answers(model: Llava, asked: list[Asked], batch: int, sampling: Sampling) -> Iterator[tuple[Asked, str]]:
    """Each question with its answer, ``batch`` of them generated at once."""
    prompts = [encode_asked(model, a) for a in asked]
    start = told_at = time.monotonic()
    for first in range(0, len(asked), batch):
        some = slice(first, first + batch)
        pixels = [look(model, a.image) for a in asked[some] if a.image]
        stacked = torch.stack(pixels) if pixels else None
        told = generate(model, prompts[some], stacked, sampling, template(model))
        for a, answer in zip(asked[some], told, strict=True):
            yield a, answer.text
        done, now = first + len(told), time.monotonic()
        if now - told_at > TELL_EVERY:
            told_at, left = now, (now - start) / done * (len(asked) - done)
            print(f"answers {done:>5,}/{len(asked):,}  {minutes(left)} left", file=sys.stderr, flush=True)


def encode_asked(model: Llava, a: Asked) -> list[int]:
    """The ids of a question, its image in front. Raises Error where they leave no position for an answer."""
    content = f"{IMAGE_TOKEN}\n{a.prompt}" if a.image else a.prompt
    message, images = [{"role": "user", "content": content}], int(a.image is not None)
    ids, _ = encode(message, model.tokenizer, template(model), images=images)
    length = len(ids) + images * (model.config.vision.num_patches - 1)
    most = min(model.config.max_length, model.config.language.max_position_embeddings)
    if length >= most:
        problem = f"takes {length:,} positions, its image included, and the model has {most:,}, answer included"
        raise Error(f"question {a.id}: {problem}; take a model with more")
    return ids


def template(model: Llava) -> str:
    """The model's own; of a stage 1 checkpoint, which only captions in its own, Vicuna's: the paper's row without
    instruction tuning."""
    return "vicuna_v1" if model.config.template == "plain" else model.config.template


def look(model: Llava, image: Path) -> Tensor:
    """(3, S, S) pixels, as the official evaluation takes them: not turned by what EXIF says."""
    return preprocess(open_image(image), model.config.vision.image_size, model.config.image_aspect_ratio)


@contextmanager
def placed(place: str) -> Iterator[None]:
    """An Error of the block is told with its place in front."""
    try:
        yield
    except Error as error:
        raise Error(f"{place}: {error}") from error


def check_images(asked: list[Asked]) -> None:
    """Raises Error that counts the images that cannot be opened, and says what is wrong with the first."""
    bad: dict[Path, Error] = {}
    for image in sorted({a.image for a in asked if a.image}):
        try:
            check_image(image)
        except Error as error:
            bad[image] = error
    if bad:
        raise Error(f"{len(bad):,} of the images cannot be used; the first: {next(iter(bad.values()))}")


def how(model: Llava, sampling: Sampling) -> dict[str, object]:
    """What else than its name and the questions decides the answers of a model."""
    return {"template": template(model), "max_new_tokens": sampling.max_new_tokens, "weights": fingerprint(model)}


def digest(content: object) -> str:
    """Sixteen hexadecimal digits that stand for a content: the same ones in every run."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
