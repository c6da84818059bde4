"""The one exception that says what a user did wrong, and how to say it on a terminal."""

import os
import sys


class Error(Exception):
    """Bad input, in one line: the file, the field and the remedy. The command lines print it and exit with status 2.

    kind: where a record or its image is at fault, what the fault is called, so that it can be counted; "" elsewhere.
    """

    def __init__(self, line: str, kind: str = ""):
        super().__init__(line)
        self.kind = kind


class Unfinished(Error):
    """What is there is good, and the same command goes on with the rest: exit status 1."""


def one_line(error: Exception) -> str | None:
    """What to say of an exception that is the user's or the machine's doing; None where it is a mistake of ours."""
    if isinstance(error, Error):
        return printable(str(error))
    if isinstance(error, OSError):
        name = printable(str(error.filename or "output"))
        return f"{name}: {error.strerror or first_line(error)}; check the path and the disk"
    if "Symlink loop" in str(error):
        return f"{first_line(error)}; check the path"
    if out_of_memory(error):
        return "out of memory on this device: try fewer rows at once, shorter ones, another --dtype or a smaller model"
    return None


def out_of_memory(error: Exception) -> bool:
    """Whether a device or the machine has no more memory to give: CUDA, MPS, a CPU and cuBLAS each say it their way."""
    said = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    known = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in said))


def say(error: Exception) -> int:
    """Print what a user or the machine did wrong, in one line; the exit status. A mistake of ours is raised again."""
    if isinstance(error, BrokenPipeError):  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python ends
        return 1
    if not (line := one_line(error)):
        raise error
    print(f"error: {line}", file=sys.stderr)
    return 1 if isinstance(error, Unfinished) else 2


def first_line(error: Exception) -> str:
    """What another library's exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(text: str, longest: int = 2000) -> str:
    """A text that may come from a user's file as one line that a terminal can show."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= longest else shown[:longest] + " ..."


def some(names: list[str], shown: int = 10) -> str:
    """How many there are, and the first few: "12 (a, b, c, ...)"."""
    return f"{len(names)} ({', '.join(names[:shown])}{', ...' if len(names) > shown else ''})"


def forgive_encoding() -> None:
    """Odd bytes in a pipe, or a terminal without Unicode, are no reason to stop."""
    for file in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(file, "reconfigure"):
            file.reconfigure(errors="replace")
