"""A teacher is asked about the questions of a benchmark, to judge or to answer; a run that was stopped goes on."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from nanollava.error import Unfinished
from nanollava.evaluate.answers import digest
from nanollava.evaluate.lines import check_resumed
from nanollava.files import plain_text
from nanollava.instruct.journal import Journal, ask_all
from nanollava.instruct.teacher import Reply, Request, add_teacher_options, open_teacher
from nanollava.train.keep import alone

RULES = Path(__file__).parent / "rules"
LONGEST = 1024  # tokens of a reply


def rule(name: str) -> str:
    """One of the texts in rules/, which may be changed: replies then have to go into another file."""
    return plain_text(RULES / f"{name}.txt", "write it, or take it from the repository")


def add_reply_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each reply; none is asked twice")
    add_teacher_options(parser)
    parser.set_defaults(temperature=0.2, max_tokens=LONGEST)  # the official judge's
    parser.set_defaults(teacher="endpoint")  # the rules of the drawn world make instructions, and judge nobody


def chat(system: str, user: str) -> list[dict]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def ask_for_all(
    args: argparse.Namespace, items: list[tuple[Request, dict]], read: Callable[[str], dict]
) -> dict[str, dict]:
    """A reply to each request, as lines of ``args.out``: by key, complete.

    items: the requests, each with the fields of its line that are known before; read: those that a reply's text gives.
    Raises Error where the file was made of other requests or by another teacher, or another run writes to it, and
    Unfinished where replies are missing in the end; what came is kept.
    """
    teacher = open_teacher(args)
    requests = [request for request, _ in items]
    asked = {"teacher": teacher.name, "temperature": teacher.temperature}
    known = {r.key: fields | asked | {"request": digest(r.messages)} for r, fields in items}

    def finish(request: Request, reply: Reply) -> dict:
        costs = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
        text = reply.text.encode(errors="replace").decode()  # halves of characters, which no later step would read
        return known[request.key] | read(text) | costs

    with alone(args.out), Journal(args.out) as journal:
        check_resumed(args.out, journal.done, known)
        new = len(requests) - len(journal.done)
        missing = ask_all(requests, teacher, journal, args.concurrency, finish)
        done = dict(journal.done)
    if missing:
        raise Unfinished(
            f"{args.out}: {missing:,} of {len(requests):,} have no reply yet; the same command asks for them"
        )
    print(f"{args.out}: {len(requests):,} replies of {teacher.name}, {new:,} of them new", file=sys.stderr)
    return done
