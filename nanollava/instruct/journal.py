"""A long run of requests that can be stopped and started: what is answered is written down at once, and not asked
again."""

import json
import os
import random
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from nanollava.error import Error, printable
from nanollava.files import check_ordinary
from nanollava.instruct.teacher import Reply, Request, Teacher, Unanswered
from nanollava.progress import minutes

FLUSH_EVERY = 0.2  # seconds between two waits for the disk itself; a killed process loses nothing, a power cut so much
BEGIN = b'{"key": '  # of each line of a journal
HOPELESS = 10  # requests in a row without an answer, after which nothing more is asked


class Journal:
    """JSON lines in a file, one for each finished key; of two lines with one key the later one counts.

    done: what was written under each key, without the key; replaced: what was written under it before.
    A last line that a kill cut short is dropped, from the file too. Raises Error naming file and line for one that is
    damaged elsewhere, for a file that is no journal, which stays as it is, and where the disk refuses.
    """

    def __init__(self, file: Path):
        self.file, self.lock, self.flushed = file, threading.Lock(), time.monotonic()
        check_ordinary(file)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.raw = file.open("ab", buffering=0)
            content = file.read_bytes()
        except OSError as error:
            raise Error(f"{file}: cannot be opened ({error.strerror}); check the path and the disk") from error
        *lines, tail = content.split(b"\n")
        self.size = len(content) - len(tail)
        read = [self._read(line) for line in lines]
        if not BEGIN.startswith(tail.rstrip(b"\0")[: len(BEGIN)]):  # no kill of ours leaves that
            lines, read = [*lines, tail], [*read, None]
        if None in read:
            self._refuse(lines, read)
        os.truncate(file, self.size)
        self.done: dict[str, dict] = {}
        self.replaced: defaultdict[str, list[dict]] = defaultdict(list)
        for fields in read:
            self._keep(fields.pop("key"), fields)

    def _keep(self, key: str, fields: dict) -> None:
        if key in self.done:
            self.replaced[key].append(self.done[key])
        self.done[key] = fields

    @staticmethod
    def _read(line: bytes) -> dict | None:
        """The fields of a line; None where it is no journal's."""
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return fields if isinstance(fields, dict) and isinstance(fields.get("key"), str) else None

    def _refuse(self, lines: list[bytes], read: list[dict | None]) -> None:
        if not any(read):
            raise Error(f"{self.file}: is no journal of replies or answers; choose another --out")
        number = read.index(None)
        remedy = "remove the line to have its item asked again, or choose another --out"
        raise Error(f"{self.file}, line {number + 1}: damaged, {printable(repr(lines[number]), 80)}; {remedy}")

    def append(self, key: str, **fields: object) -> None:
        """Write a line, at once and whole or not at all."""
        line = json.dumps({"key": key, **fields}).encode() + b"\n"
        with self.lock:
            try:
                written = self.raw.write(line)
                if time.monotonic() - self.flushed > FLUSH_EVERY:
                    self._flush()
                reason = "the disk is full"
            except OSError as error:
                written, reason = 0, error.strerror
            if written != len(line):
                os.truncate(self.file, self.size)
                remedy = "mend that and give the same command again: what is in it counts"
                raise Error(f"{self.file}: cannot be written ({reason}); {remedy}")
            self.size += len(line)
            self._keep(key, fields)

    def _flush(self) -> None:
        os.fsync(self.raw.fileno())
        self.flushed = time.monotonic()

    def close(self) -> None:
        """Nothing is written after that; who still tries gets a ValueError."""
        with self.lock:
            if not self.raw.closed:
                self._flush()
                self.raw.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


Finish = Callable[[Request, Reply], dict]
Outcome = tuple[Request, Reply | Exception]


def ask_all(
    requests: list[Request], teacher: Teacher, journal: Journal, concurrency: int, finish: Finish, keep_refused=False
) -> int:
    """Ask for all that is not in ``journal.done`` or is a further attempt, ``concurrency`` of them at once, and write
    down each reply.

    finish: the fields of the journal's line, for example ``lambda request, reply: reply._asdict()``. It may be called
    by several threads at once.
    keep_refused: write down what is refused for good too, as an empty reply, so that it is not asked in every run.
    Returns how many stayed unanswered, which may be asked again in another run; after HOPELESS of them in a row the
    rest is not asked. Raises Error as ``Teacher.ask`` does, and where there are so many before the first answer; what
    came before has been written down.
    """
    waiting = in_order(requests, journal)
    at_once = min(concurrency, teacher.at_once, len(waiting))
    progress = Progress(len(requests), len(waiting), teacher)
    answered = any(not fields.get("refused") for fields in journal.done.values())
    patience = Patience(progress, max(HOPELESS, at_once), answered)

    def answer(request: Request) -> Outcome:
        try:
            reply = reply_to(request, teacher, keep_refused)
            journal.append(request.key, **finish(request, reply))
            return request, reply
        except Exception as error:
            return request, error

    came = in_turn(answer, waiting) if at_once < 2 else side_by_side(answer, waiting, at_once)
    with progress, closing(came) as outcomes:
        for request, reply in outcomes:
            if isinstance(reply, Reply):
                progress.count(reply)
            elif isinstance(reply, Exception) and not isinstance(reply, Unanswered):
                raise reply
            if reply is not None and patience.ends(request, reply):
                break
            progress.show()
        progress.end()
    return progress.total - progress.done


def in_order(requests: list[Request], journal: Journal) -> list[Request]:
    """Those to be asked: first what no run has come to yet, then, shuffled, what earlier ones left behind. So what
    stays unanswered in every run stands in nobody's way."""
    reached = max((number for number, request in enumerate(requests) if request.key in journal.done), default=0)
    passed = random.sample(requests[:reached], reached)
    return [r for r in (*requests[reached:], *passed) if r.attempt or r.key not in journal.done]


def reply_to(request: Request, teacher: Teacher, keep_refused: bool) -> Reply:
    """Raises Error and Unanswered as ``Teacher.ask`` does; with ``keep_refused`` a refusal for good is a reply."""
    try:
        return teacher.ask(request)
    except Unanswered as error:
        if not (keep_refused and error.for_good):
            raise
        return Reply("", 0, 0, refused=str(error))


@dataclass
class Patience:
    """Ends after ``most`` requests in a row without an answer. What is refused for good counts only until the first
    answer: later it may be single cases."""

    progress: "Progress"
    most: int
    answered: bool
    in_a_row: int = 0

    def ends(self, request: Request, reply: Reply | Unanswered) -> bool:
        """Say what is no answer; whether that is one too many. Raises Error where there never was an answer."""
        reason = printable(reply.refused if isinstance(reply, Reply) else str(reply))
        if not reason:
            self.in_a_row, self.answered = 0, True
            return False
        for_good = isinstance(reply, Reply) or reply.for_good
        self.progress.leave()
        print(f"{'refused' if for_good else 'unanswered'}: {request.key}: {reason}", file=sys.stderr)
        self.in_a_row += not (for_good and self.answered)
        if self.in_a_row < self.most:
            return False
        problem = f"{self.in_a_row} requests in a row stayed unanswered, the last for: {reason}"
        if not self.answered:
            raise Error(f"{problem}; mend that, and give the same command again")
        print(f"{problem}; the rest is not asked now", file=sys.stderr)
        return True


def in_turn(answer: Callable[[Request], Outcome], waiting: list[Request]) -> Iterator[Outcome]:
    """The outcomes one by one, without threads."""
    yield from map(answer, waiting)


def side_by_side(answer: Callable, waiting: list[Request], threads: int) -> Iterator[Outcome | tuple[None, None]]:
    """The outcomes as they come, (None, None) where none came for a second. Closed early, it asks for nothing more;
    what is under way is left to end by itself, and keeps nobody waiting."""
    remaining, lock = iter(waiting), threading.Lock()
    outcomes, stopped = SimpleQueue(), threading.Event()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                request = next(remaining, None)
            if request is None:
                return
            outcomes.put(answer(request))

    try:
        for _ in range(threads):
            threading.Thread(target=work, daemon=True).start()
        came = 0
        while came < len(waiting):
            try:
                yield outcomes.get(timeout=1)
                came += 1
            except Empty:
                yield None, None
    finally:
        stopped.set()


class Progress:
    """A line on stderr with rate, cost in tokens and time left: rewritten on a terminal, anew every 10 seconds
    elsewhere."""

    def __init__(self, total: int, waiting: int, teacher: Teacher):
        self.total, self.teacher = total, teacher
        self.done = self.before = total - waiting
        self.read = self.written = 0
        self.started = self.shown = time.monotonic()
        self.begun = False  # whether a line stands there without its end
        self.terminal = sys.stderr is not None and sys.stderr.isatty()

    def count(self, reply: Reply) -> None:
        self.done += 1
        self.read += reply.prompt_tokens
        self.written += reply.completion_tokens

    def show(self) -> None:
        """Print the line, where the last one is long enough ago."""
        now = time.monotonic()
        if now - self.shown >= (0.2 if self.terminal else 10):
            self.shown = now
            self._print(end="" if self.terminal else "\n")

    def leave(self) -> None:
        """End a line that stands there, so that something else can be printed below."""
        if self.begun:
            self.begun = False
            print(file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not KeyboardInterrupt:  # what is said of Ctrl-C begins a line by itself
            self.leave()

    def end(self) -> None:
        if self.done > self.before:
            self._print(end="\n")

    def _print(self, end: str) -> None:
        self.begun = not end
        line = self.line(time.monotonic() - self.started)
        print(f"\r{line}\x1b[K" if self.terminal else line, end=end, file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """What is done after so many seconds of this run."""
        asked = self.done - self.before
        rate = asked / max(seconds, 1e-9)
        left = f"{minutes((self.total - self.done) / rate)} left" if asked else "time left not known yet"
        tokens = f"{self.read:,} tokens read, {self.written:,} written"
        again = f"  (repeating: {printable(self.teacher.trouble, 60)})" if self.teacher.trouble else ""
        return f"{self.done:,}/{self.total:,}  {rate:.1f} replies/s  {tokens}  {left}{again}"
