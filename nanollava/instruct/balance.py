"""python -m nanollava.instruct balance chat.json --out chat-balanced.json

Captions chosen so that frequent things do not drown rare ones: how the paper made 595K image-text pairs of CC3M's 3M
for stage 1 (LLaVA section 4.2 and appendix).

    Count in how many captions each noun phrase occurs. Those of fewer than 3 are skipped: usually rare combinations of
    what other phrases cover. Then, from the rarest phrase on, the captions with it join the pool; of a phrase with more
    than 100 captions, 100 drawn at random from all of them join.

The draw of a phrase does not ask what the pool holds already, as the paper words it. So a caption may come in by any
of its phrases, and more than 100 captions with a frequent one may stay.
"""

import argparse
import json
import random
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanollava.conversation import messages_from_record
from nanollava.error import Error, printable
from nanollava.files import write_whole
from nanollava.folder import read_json
from nanollava.instruct.phrases import SPACY_MODEL, simple_phrases, spacy_phrases
from nanollava.progress import progress
from nanollava.train.records import read_list

LEAST, MOST = 3, 100  # the paper's


class Captions(NamedTuple):
    """The captions of a file, and what to write for those that are kept: a file of the same kind."""

    texts: list[str]
    content: Callable[[np.ndarray], list | dict]  # numbers of the kept captions, ascending


@dataclass
class Choice:
    """What was kept, and how often each phrase occurs before and after."""

    kept: np.ndarray  # (captions,) bool
    phrases: list[str]
    before: np.ndarray  # (phrases,) captions that contain it
    after: np.ndarray  # the same among those kept


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises Error."""
    run(make_parser().parse_args(argv))
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nanollava.instruct balance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="COCO's captions_*.json, or records in the official format")
    add("--out", type=Path, help="file for what is kept, of the same kind")
    add("--finder", choices=("simple", "spacy"), default="simple", help="rules of ours, or the paper's spaCy (simple)")
    add("--spacy-model", default=SPACY_MODEL, help=f"({SPACY_MODEL})")
    add("--processes", type=int, default=1, help="of spaCy's, side by side (1)")
    add("--least", type=int, default=LEAST, help=f"captions that a phrase must occur in to count ({LEAST})")
    add("--most", type=int, default=MOST, help=f"captions drawn for a phrase ({MOST})")
    add("--seed", type=int, default=0)
    add("--dry-run", action="store_true", help="print the summary, write nothing")
    return parser


def run(args: argparse.Namespace) -> None:
    """Read, choose, tell, write. Raises Error for options that make no sense, and for a file of another kind."""
    check(args)
    captions = read_captions(args.file)
    choice = choose(find(captions.texts, args), args.least, args.most, args.seed)
    print(summary(args, choice))
    if not choice.kept.any():
        raise Error(f"{args.file}: no noun phrase is in {args.least} captions, nothing would be kept; lower --least")
    if not args.dry_run:
        args.out.resolve().parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, as_json(captions.content(np.flatnonzero(choice.kept))))
        print(f"written to {args.out}")


def check(args: argparse.Namespace) -> None:
    for name in ("least", "most", "processes"):
        if getattr(args, name) < 1:
            raise Error(f"--{name} is {getattr(args, name)}: it must be 1 or more")
    if args.dry_run:
        return
    if args.out is None:
        raise Error("give --out FILE for what is kept; --dry-run alone does without")
    if args.out.exists():
        raise Error(f"--out {args.out}: is there already; choose another name, or remove it")


# ---------------------------------------------------------------- files


def read_captions(file: Path) -> Captions:
    """The captions of a file of COCO's, or the answers of official records. Raises Error naming what is missing."""
    try:
        with file.open(encoding="utf-8", errors="replace") as opened:
            is_object = opened.read(1000).lstrip().startswith("{")
    except OSError as error:
        raise Error(f"{file}: cannot be read ({error.strerror}); give a file of captions or of records") from error
    return from_coco(file, read_json(file)) if is_object else from_records(file, read_list(file))


def from_coco(file: Path, content: dict) -> Captions:
    """Each annotation is a caption; an image stays as long as one of its captions does."""
    annotations = content.get("annotations")
    if not isinstance(annotations, list) or not annotations:
        raise Error(f'{file}: the field "annotations" is missing or empty; is it one of COCO\'s captions_*.json?')
    for number, annotation in enumerate(annotations):
        if not isinstance(annotation, dict) or not isinstance(annotation.get("caption"), str):
            raise Error(f'{file}: annotations[{number}] has no "caption"; is it one of COCO\'s captions_*.json?')
    images = content.get("images")
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        raise Error(f'{file}: the field "images" is missing or no list of objects; give COCO\'s file as it came')

    def keep(numbers: np.ndarray) -> dict:
        kept = [annotations[i] for i in numbers]
        shown = {str(annotation.get("image_id")) for annotation in kept}
        return content | {"images": [i for i in images if str(i.get("id")) in shown], "annotations": kept}

    return Captions([annotation["caption"] for annotation in annotations], keep)


def from_records(file: Path, records: list[dict]) -> Captions:
    """A record's caption is what gpt says in it."""
    try:
        answers = [[m["content"] for m in messages_from_record(r) if m["role"] == "assistant"] for r in records]
    except Error as error:
        remedy = f"python -m nanollava.train.data check {file} lists all such records"
        raise Error(f"{file}: {printable(str(error), 500)}; {remedy}") from error
    return Captions(["\n".join(texts) for texts in answers], lambda numbers: [records[i] for i in numbers])


def as_json(content: list | dict) -> str:
    """JSON; of a list each entry has a line of its own."""
    return "[" + ",\n ".join(map(json.dumps, content)) + "]\n" if isinstance(content, list) else json.dumps(content)


# ---------------------------------------------------------------- the choice


def find(texts: list[str], args: argparse.Namespace) -> Iterator[set[str]]:
    """The noun phrases of each caption, by the finder that was asked for."""
    found = map(simple_phrases, texts)
    if args.finder == "spacy":
        found = spacy_phrases(texts, args.spacy_model, args.processes)
    return progress(found, len(texts), "captions")


def choose(found: Iterable[set[str]], least: int = LEAST, most: int = MOST, seed: int = 0) -> Choice:
    """The filter itself, of the phrases of each caption.

    From the rarest phrase with at least ``least`` captions to the most frequent: all captions with it are kept, or
    ``most`` of them drawn at random. Phrases of one frequency come in alphabetical order, so that the same seed draws
    the same captions.
    """
    numbers: dict[str, int] = {}
    pairs = array("i"), array("i")  # phrase and caption, one pair for each caption that a phrase occurs in
    captions = 0
    for caption, phrases in enumerate(found):
        captions = caption + 1
        for phrase in sorted(phrases):
            pairs[0].append(numbers.setdefault(phrase, len(numbers)))
            pairs[1].append(caption)
    phrase_of, caption_of = (np.frombuffer(column, np.int32) if column else np.zeros(0, np.int32) for column in pairs)
    before = np.bincount(phrase_of, minlength=len(numbers))
    members = caption_of[np.argsort(phrase_of, kind="stable")]  # the captions of phrase 0, ascending, of phrase 1, ...
    starts = np.cumsum(before) - before
    kept, rng, names = np.zeros(captions, bool), random.Random(seed), list(numbers)
    for i in sorted(np.flatnonzero(before >= least), key=lambda i: (before[i], names[i])):
        count = int(before[i])
        chosen = range(count) if count <= most else rng.sample(range(count), most)
        kept[members[starts[i] + np.array(chosen)]] = True
    after = np.bincount(phrase_of, weights=kept[caption_of], minlength=len(numbers)).astype(int)
    return Choice(kept, names, before, after)


def summary(args: argparse.Namespace, choice: Choice) -> str:
    """What was found and kept, and what became of the most frequent phrases."""
    captions, kept, before = len(choice.kept), int(choice.kept.sum()), choice.before
    rare, frequent = int((before < args.least).sum()), int((before > args.most).sum())
    finder = "simple rules, not spaCy" if args.finder == "simple" else f"spaCy, {args.spacy_model}"
    lines = [
        f"{args.file}: {captions:,} captions",
        f"noun phrases ({finder}): {len(before):,} different, {before.sum() / captions:.1f} in a caption",
        f"  in fewer than {args.least} captions, skipped: {rare:,}",
        f"  in more than {args.most}, of which so many are drawn: {frequent:,}",
        f"captions kept: {kept:,} of {captions:,} ({100 * kept / captions:.1f}%)",
    ]
    top = np.argsort(-before, kind="stable")[:5]
    lines += [f"  {printable(choice.phrases[i], 40)}: {before[i]:,} before, {choice.after[i]:,} after" for i in top]
    return "\n".join(lines)
