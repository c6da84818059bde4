"""Text files: prose and JSON lines are read, and a file is written as a whole."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from nanollava.error import Error, first_line


def json_lines(file: Path) -> Iterator[tuple[str, dict]]:
    """(what to call it in an error, object) for each line of a file that is not blank.

    Raises Error for a file that cannot be read, and naming the line for one that is not whole JSON or no object.
    """
    try:
        # splitlines would cut at rarer signs inside a text too
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise Error(f"{file}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise Error(f"{file}: is not UTF-8 text ({first_line(error)}); write it again") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            remedy = "mend or remove the line; a step that wrote the file goes on where it stopped"
            raise Error(f"{place}: is not whole JSON ({first_line(error)}); {remedy}") from error
        if not isinstance(content, dict):
            raise Error(f"{place}: holds a {type(content).__name__}, expected an object {{...}}")
        yield place, content


def plain_text(file: Path, remedy: str) -> str:
    """What a text file says, without the white space around it. Raises Error with the ``remedy`` where that is nothing,
    or it cannot be read."""
    try:
        text = file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = first_line(error) if isinstance(error, UnicodeDecodeError) else error.strerror
        raise Error(f"{file}: cannot be read ({reason}); {remedy}") from error
    if not text:
        raise Error(f"{file}: is empty; {remedy}")
    return text


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it is there as a whole or, after a kill or a full disk, as it was before.

    Raises Error where the disk refuses, and for what is there and is no file: a folder, a device.
    """
    check_ordinary(file)
    new = file.with_name(f".{file.name}.saving")
    try:
        with new.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        new.replace(file)
    except OSError as error:
        raise Error(f"{file}: cannot be written ({error.strerror}); check the path and the disk") from error
    finally:
        if os.path.exists(new):  # pathlib's exists raises on names that are too long
            new.unlink()


def check_ordinary(file: Path) -> None:
    """Raises Error for a device or a pipe, which nothing can be kept in. (As root one could replace /dev/null.)"""
    if os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file):
        raise Error(f"{file}: is no ordinary file; choose another name for --out")


def check_apart(out: Path, *inputs: Path | None) -> None:
    """Raises Error where ``out`` would replace one of the files that it is made of."""
    for file in inputs:
        if file and os.path.exists(file) and os.path.exists(out) and os.path.samefile(file, out):
            raise Error(f"--out {out}: is {file}, which is read; choose another name")
