"""Who is asked: a request goes to a teacher, a reply comes back (LLaVA section 3; judges of section 5.1 as well).

There are three: an OpenAI-compatible endpoint (endpoint.py), the rules of the miniature world (rules.py), which need
neither network nor key, and a language model in a folder (local.py).
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nanollava.config import LARGEST
from nanollava.error import Error
from nanollava.instruct.contexts import Context

OPENAI = "https://api.openai.com/v1"
DAY = 86_400  # seconds
RANGES = {  # what the options may say: at least, at most
    "concurrency": (1, 10**6), "max_tokens": (1, LARGEST), "retries": (0, 10**6), "retry_pause": (0, DAY),
    "temperature": (0, 100),
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One question to a teacher."""

    key: str  # names the item in every file; unique
    messages: list[dict]  # OpenAI chat messages: {"role": "system", "user" or "assistant", "content": text}
    kind: str = ""  # conversation, detail, reasoning, judge, ...
    context: Context | None = None  # captions and boxes, for the rule-based teacher, which reads no prose
    attempt: int = 0  # how many replies came before; above 0 it is asked although there is one


class Reply(NamedTuple):
    text: str
    prompt_tokens: int
    completion_tokens: int
    cut: bool = False  # whether it ends where the teacher had to stop, at --max-tokens for example
    refused: str = ""  # why the teacher, or a filter that it stands behind, gives none


def tokens_in(count: object) -> int:
    """A number of tokens as somebody else gives it; 0 where that is none."""
    return count if isinstance(count, int) and 0 <= count < 2**63 else 0


class Unanswered(Exception):
    """A request stayed without an answer: all repetitions are used up, or none would help this one. Others may fare
    better, and the same request may be asked again in another run.

    for_good: whether it is the request itself that is refused, which another time does not mend.
    """

    def __init__(self, reason: str, for_good: bool = False):
        super().__init__(reason)
        self.for_good = for_good


class Teacher:
    """Answers requests, ``at_once`` of them at most, each in a thread of its own.

    name: which one it is, as the files have it; it never holds a key.
    temperature: how varied its answers are, as the files have it too; None where nothing was asked for.
    trouble: why it last had to repeat a request, for the progress line.
    """

    name: str
    temperature: float | None = None
    at_once = 1
    trouble = ""

    def ask(self, request: Request) -> Reply:
        """Raises Error for what no repetition mends (a wrong key, an unknown model), Unanswered as described there."""
        raise NotImplementedError


def add_teacher_options(parser: argparse.ArgumentParser) -> None:
    """The options that ``open_teacher`` reads. ``parser.set_defaults(temperature=0.2)`` gives a command its own."""
    add = parser.add_argument_group("teacher").add_argument
    known = "miniature (the rules of the drawn world), endpoint, or the FOLDER of a LLaMA-family model (%(default)s)"
    add("--teacher", default="miniature", metavar="WHO", help=known)
    add("--base-url", default=OPENAI, metavar="URL", help=f"of an OpenAI-compatible endpoint ({OPENAI})")
    add("--teacher-model", metavar="NAME", help="which model the endpoint shall take; the key is in OPENAI_API_KEY")
    add("--concurrency", type=int, default=8, help="requests to an endpoint at once (8)")
    varied = "how varied answers are; default is the endpoint's own, 0 for a FOLDER (%(default)s)"
    add("--temperature", type=temperature, default="default", metavar="NUMBER", help=varied)
    add("--max-tokens", type=int, default=1024, help="longest answer (1024)")
    add("--timeout", type=float, default=120.0, help="seconds to wait for an answer before asking again (120)")
    add("--retries", type=int, default=8, help="how often a request that failed is repeated (8)")
    add("--retry-pause", type=float, default=1.0, help="seconds before the first repetition; each time twice that (1)")


def temperature(word: str) -> float | None:
    """A number; None for "default", by which a command line takes back what its command has set."""
    return None if word == "default" else float(word)


def open_teacher(args: argparse.Namespace) -> Teacher:
    """The teacher that the options of ``add_teacher_options`` ask for. Raises Error where there is none such."""
    check_options(args)
    if args.teacher == "miniature":
        from nanollava.instruct.rules import RuleTeacher

        return RuleTeacher()
    if args.teacher == "endpoint":
        from nanollava.instruct.endpoint import EndpointTeacher

        if not args.teacher_model or not args.teacher_model.isprintable():
            raise Error("--teacher endpoint: name its model too, on one line, with --teacher-model")
        limits = {name: getattr(args, name) for name in ("temperature", "max_tokens", "timeout", "retries")}
        return EndpointTeacher(args.teacher_model, args.base_url, pause=args.retry_pause, **limits)
    if not Path(args.teacher).is_dir():
        raise Error(f"--teacher {args.teacher}: no such folder; give one, or one of the words miniature and endpoint")
    from nanollava.instruct.local import LocalTeacher

    return LocalTeacher(Path(args.teacher), args.temperature or 0.0, args.max_tokens)


def check_options(args: argparse.Namespace) -> None:
    """Raises Error for numbers that make no sense."""
    for name, (least, most) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise Error(f"--{name.replace('_', '-')} {value}: give {least} or more, at most {most:,}")
    if not 0 < args.timeout <= DAY:
        raise Error(f"--timeout {args.timeout}: give more than 0 seconds, at most {DAY:,}")
