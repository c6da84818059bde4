"""The benchmarks' files: JSON lines, one object for each question, matched by id and never by their order.

Whatever does not fit together is one line that names the file and the id: an unknown id, a missing or doubled one, a
line that broke off, and, where a step goes on, results that were made of something else.
"""

from collections.abc import Collection, Iterable
from pathlib import Path

from nanollava.error import Error, printable, some
from nanollava.files import json_lines


def read_lines(file: Path, field: str = "question_id", texts: Collection[str] = ()) -> dict[str, dict]:
    """The objects of a JSON-lines file by what their ``field`` says, in the order of the file; ids may be numbers.

    texts: the fields that each must have as text.
    Raises Error, naming file, line and id, where the file is missing, empty or broken off, an id is there twice, or a
    field is missing or is no text.
    """
    rows: dict[str, dict] = {}
    for place, row in json_lines(file):
        name = row.get(field)
        if isinstance(name, bool) or not isinstance(name, int | str):
            raise Error(f'{place}: the field "{field}" is missing, or neither a number nor text')
        if str(name) in rows:
            raise Error(f"{place}: {field} {printable(str(name), 100)} is there twice; remove one of the two")
        if wrong := [text for text in texts if not is_text(row.get(text))]:
            raise Error(f'{place}: {field} {printable(str(name), 100)}: the field "{wrong[0]}" is missing, or no text')
        rows[str(name)] = row
    if not rows:
        raise Error(f"{file}: is empty; it must have a line for each {field}")
    return rows


def is_text(value: object) -> bool:
    """Whether it is text that can be written down: JSON can hold halves of characters, which no file or model takes."""
    return isinstance(value, str) and value == value.encode(errors="replace").decode()


def check_known(file: Path, ids: Iterable[str], known: Collection[str], among: object) -> None:
    """Raises Error where ``file`` has ids that are not known ``among`` the questions of another."""
    if unknown := [printable(name, 100) for name in ids if name not in known]:
        raise Error(f"{file}: ids that {among} does not have: {some(unknown)}; are these files of one benchmark?")


def check_complete(file: Path, wanted: Collection[str], found: Collection[str], remedy: str) -> None:
    """Raises Error where ``file`` lacks wanted ids."""
    if missing := [printable(name, 100) for name in wanted if name not in found]:
        raise Error(f"{file}: of {len(wanted)} questions these are missing: {some(missing)}; {remedy}")


def check_resumed(file: Path, done: dict[str, dict], expected: dict[str, dict]) -> None:
    """Raises Error where what a file already holds is not what this run would add to: other ids, or other fields than
    the ``expected`` ones (a model's name, the text of a question, ...)."""
    remedy = "give another --out"
    for key, row in done.items():
        place = f"{file}: question {printable(key, 100)}"
        if key not in expected:
            raise Error(f"{place} is none of the questions now; {remedy}")
        for field, value in expected[key].items():
            if row.get(field) != value:
                was, now = (printable(repr(v), 100) for v in (row.get(field), value))
                raise Error(f'{place} was made with another "{field}" ({was}, now {now}); {remedy}')
