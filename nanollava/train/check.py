"""python -m nanollava.train.data check FILE --images DIR

What training would refuse, leave out or cut of a file of records, as a table. Each record goes through the reader that
training uses (records.py), so the two cannot disagree.

Exit status: 0 nothing found, 1 something found, 2 the file cannot be read.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from nanollava.checkpoint import load, load_vision
from nanollava.config import LARGEST
from nanollava.conversation import TEMPLATES, images_from_record
from nanollava.error import Error, forgive_encoding, printable, say
from nanollava.folder import last_good, read_json
from nanollava.images import check_image, open_image
from nanollava.llava import LlavaConfig
from nanollava.progress import progress
from nanollava.tokenizer import IMAGE_TOKEN_ID, Tokenizer, load_tokenizer
from nanollava.train.records import LOSSES, Reader, Report, read_list
from nanollava.vit import VisionConfig

# The kinds of Error that a record may meet; training refuses it, or goes on without it where --skip-bad is given.
REFUSED = {
    "no record": "not in the official format",
    "no answer": "no turn of gpt's",
    "roles out of order": "roles out of order: human and gpt must alternate",
    "empty answer": "an answer is empty",
    "marks": "<image> marks and images do not match",
    "plain": "not a single caption of an image, which template plain takes",
    "no room": "too long: its images alone do not fit into a row",
    "image name": "the name of an image is no path inside the folder",
    "no image folder": "it has images, and no --images FOLDER was given",
    "image missing": "an image is missing",
    "image unreadable": "an image cannot be read: empty, damaged, too large, or no image",
}
DECODED = {"image damaged": "an image breaks off or is damaged inside: left out, with a line, when training meets it"}
SHOWN = 5  # ids of a kind


class Words:
    """In a tokenizer's place where there is none: one token for each word. Pieces of SentencePiece end where words do,
    so no tokenizer makes fewer: what is too long here is too long for every model."""

    bos_id, eos_id, image_ids, legacy = 1, 2, [IMAGE_TOKEN_ID], False

    def encode(self, text: str, bos: bool = True, prefix: bool = True) -> list[int]:
        return [self.bos_id] * bos + [0] * len(text.split())


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = make_parser().parse_args(argv)
    forgive_encoding()
    try:
        return check(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except Exception as error:
        return say(error)


def make_parser() -> argparse.ArgumentParser:
    described = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m nanollava.train.data", description=__doc__, **described)
    commands = parser.add_subparsers(required=True, dest="command", metavar="check")
    command = commands.add_parser("check", help="what training would refuse, leave out or cut", **described)
    command.description = __doc__
    add = command.add_argument
    add("file", type=Path, metavar="FILE", help="records: a JSON array in the official format")
    add("--images", type=Path, metavar="DIR", help="folder that the records' image names start from")
    add("--decode", action="store_true", help="read images whole; training, before its start, reads their headers")
    add("--model", type=Path, help="LLaVA or Vicuna folder: count tokens as it does; without it, words")
    add("--vision", type=Path, help="CLIP folder: how many patches an image has, where --model does not tell (576)")
    add("--template", choices=list(TEMPLATES), default="vicuna_v1", help="plain: as stage 1 does (vicuna_v1)")
    add("--max-length", type=int, help="positions of a row after splicing (the model's, or 2048)")
    return parser


def check(args: argparse.Namespace) -> int:
    """Read the file, print the table; 1 where there is anything in it. Raises Error where the file cannot be read."""
    if args.max_length is not None and not 0 < args.max_length <= LARGEST:
        raise Error(f"--max-length is {args.max_length}: it must be above 0 and at most {LARGEST:,}")
    tokenizer, config = measures(args.model, args.vision)
    config.max_length = args.max_length or config.max_length
    reader = Reader(args.images, tokenizer, config, args.template, open_image if args.decode else check_image)
    records = read_list(args.file)
    if args.decode and args.images:
        look_at_all(reader, records)
    concerned = 0
    for record in progress(records, len(records), "records"):
        before = len(reader.report.findings)
        reader.read(record)
        concerned += len(reader.report.findings) > before
    print(f"{args.file}: {reader.report.records:,} records; something was found in {concerned:,} of them")
    print(f"lengths: {in_words(args, config)}")
    print("images: read whole\n" if args.decode else "images: by their headers; --decode reads them whole\n")
    print(table(reader.report, args.decode))
    return int(concerned > 0)


def measures(model: Path | None, vision: Path | None) -> tuple[Tokenizer | Words, LlavaConfig]:
    """What lengths are counted with: the tokenizer and the sizes of a folder; words, and v1.5's sizes, without one.
    No weight is read. Raises Error for a folder that is damaged or has no tokenizer."""
    if model and has_tower(model):
        whole = load(model, "meta", vision=vision)
        if whole.tokenizer is None:
            raise Error(f"{model}: no tokenizer.model in it; leave --model out to count words")
        return whole.tokenizer, whole.config
    sizes = load_vision(vision, "meta").config if vision else VisionConfig(336, 14)
    return load_tokenizer(last_good(model)) if model else Words(), LlavaConfig(sizes)


def has_tower(model: Path) -> bool:
    """Whether it is a LLaVA, whose config tells the patches of an image."""
    file = last_good(model) / "config.json"
    return file.is_file() and read_json(file).get("model_type") != "llama"


def in_words(args: argparse.Namespace, config: LlavaConfig) -> str:
    """How lengths were measured."""
    sizes = f"rows of {config.max_length:,} positions, {config.vision.num_patches} for an image, {args.template}"
    if args.model:
        guessed = "" if args.vision or has_tower(args.model) else "but for images (--vision FOLDER tells their size), "
        return f"exact, {guessed}with the tokenizer of {args.model}; {sizes}"
    return f"a lower bound, each word one token; {sizes}\n  (--model FOLDER counts tokens: more may be too long then)"


def look_at_all(reader: Reader, records: list) -> None:
    """Let the reader see all images of the records beforehand, several at a time: decoding takes long."""
    names = list(dict.fromkeys(name for record in records for name in images_of(record)))

    def look(name: str) -> None:
        with suppress(Error):  # the reader raises it again for each record with this image
            reader.check_once(name)

    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        for _ in progress(pool.map(look, names), len(names), "images"):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def images_of(record: object) -> Iterable[str]:
    """The names of a record's images, none where it is damaged."""
    with suppress(Error):
        return images_from_record(record) if isinstance(record, dict) else ()
    return ()


def table(report: Report, decoded: bool) -> str:
    """A line for each kind of finding: how many records, and the first few ids."""
    unnamed = {f.kind: f.problem for f in report.findings if f.kind not in REFUSED | LOSSES | DECODED}
    parts = {
        "refused by training, or left out with --skip-bad:": REFUSED | unnamed,
        "read by training, not without loss:": LOSSES | (DECODED if decoded else {}),
    }
    width = 2 + max(len(words) for kinds in parts.values() for words in kinds.values())
    lines = []
    for title, kinds in parts.items():
        lines.append(f"{title:<{width}} {'records':>9}  first ids")
        for kind, words in kinds.items():
            found = [f._replace(record=printable(f.record, 30)) for f in report.findings if f.kind == kind]
            ids = ", ".join(f.name for f in found[:SHOWN]) + ", ..." * (len(found) > SHOWN)
            lines.append(f"  {words:<{width - 2}} {len(found):>9,}  {ids}".rstrip())
    return "\n".join(lines)
