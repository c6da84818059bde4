"""The notebooks as they are committed: run to their end, pictures kept, prose that says nothing untrue."""

import ast
import base64
import importlib
import json
import re
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOURCES = [*(ROOT / "nanollava").rglob("*.py"), ROOT / "train.py", ROOT / "chat.py", ROOT / "notebooks/figures.py"]
NOT_MEASURED = re.compile(
    r"```.*?```|`[^`]*`|\$[^$]*\$|\]\([^)]*\)|(section|equation|table|figure)s? [\d.]+|[-v]\d\.\d", re.S
)
MOST_BYTES = 15_000_000  # of the folder
every = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def cells(file: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def text(cell: dict) -> str:
    return "".join(cell["source"])


def outputs(cell: dict, kind: str) -> list[str]:
    """The outputs of a cell that are of a MIME type; what it prints is text/plain."""
    found = [out.get("data", {}).get(kind) for out in cell["outputs"]]
    found += [out["text"] for out in cell["outputs"] if out["output_type"] == "stream" and kind == "text/plain"]
    return ["".join(out) for out in found if out is not None]


def prose(file: Path) -> list[str]:
    """Cells of prose, without the code in them."""
    return [re.sub(r"^```.*?^```", "", text(cell), flags=re.M | re.S) for cell in cells(file, "markdown")]


def names_in(code: str) -> set[str]:
    """Every name that a piece of Python defines or uses."""
    nodes, fields = list(ast.walk(ast.parse(code))), ("id", "attr", "arg", "name")
    return {name for node in nodes for field in fields if isinstance(name := getattr(node, field, None), str)}


KNOWN = set().union(*(names_in(file.read_text(encoding="utf-8")) for file in SOURCES))


def test_they_are_numbered_without_a_gap():
    assert FILES and [int(file.name[:2]) for file in FILES] == list(range(len(FILES)))


def test_the_folder_is_small():
    assert sum(file.stat().st_size for file in (ROOT / "notebooks").rglob("*") if file.is_file()) < MOST_BYTES


@every
def test_it_was_run_from_its_first_cell_to_its_last(file):
    code = cells(file, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [out for cell in code for out in cell["outputs"] if out["output_type"] == "error"]


@every
def test_it_has_a_figure_and_those_are_no_wider_than_they_are_shown(file):
    pictures = [base64.b64decode(png) for cell in cells(file, "code") for png in outputs(cell, "image/png")]
    assert pictures
    widths = [int.from_bytes(png[16:20], "big") for png in pictures]  # the first field of a PNG's header
    assert min(widths) > 0 and max(widths) <= 900


@every
def test_cells_are_short_and_stand_between_prose(file):
    code = cells(file, "code")
    assert len(cells(file, "markdown")) >= 0.6 * len(code)
    assert median(text(cell).count("\n") + 1 for cell in code) <= 8
    assert max(len(line) for cell in code for line in text(cell).splitlines()) <= 100


@every
def test_it_opens_with_what_it_is_for_and_ends_in_exercises_with_solutions(file):
    first, all_prose = prose(file)[0], "\n".join(text(cell) for cell in cells(file, "markdown"))
    assert first.startswith(f"# {int(file.name[:2])}. ") and "*In the paper*" in first and "At the end" in first
    exercises = all_prose.partition("## Exercises")[2]
    asked = re.findall(r"^\*\*(\d)\.\*\*", exercises, flags=re.M)
    assert asked == [str(number + 1) for number in range(len(asked))] and 3 <= len(asked) <= 5
    assert exercises.count("<details><summary>Solution</summary>") == exercises.count("</details>") == len(asked)


@every
def test_links_lead_somewhere(file):
    links = re.findall(r"\]\(([^)]+)\)", "\n".join(prose(file)))
    inside = [link.partition("#")[0] for link in links if not link.startswith("http")]
    assert [link for link in inside if not (file.parent / link).exists()] == []


def test_terms_of_the_glossary_stand_in_korean_in_the_notebooks_that_it_names():
    glossary = (ROOT / "notebooks" / "GLOSSARY.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .+ \| (.+) \| .+ \| ([\d, ]+) \|$", glossary, flags=re.M)
    missing = [
        (term, numbers)
        for terms, numbers in rows
        for term in terms.split(", ")
        if not any(term in "".join(prose(FILES[int(number)])) for number in numbers.split(", "))
    ]
    assert len(rows) > 50 and missing == []


@every
def test_what_is_named_exists(file):
    known = KNOWN | set().union(*(names_in(text(cell)) for cell in cells(file, "code")))
    files = {source.name for source in SOURCES} | {path.name for path in ROOT.glob("*") if path.is_file()}
    missing = []
    for span in re.findall(r"`([^`\n]+)`", "\n".join(prose(file))):
        if re.fullmatch(r"[\w/.-]+\.(py|ipynb|md)", span):
            found = Path(span).name in files or (file.parent / span).exists()
        elif span.startswith("nanollava."):
            found = resolves(span.removesuffix("()"))
        elif re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*(\(\))?", span):
            found = span.removesuffix("()").rpartition(".")[2] in known
        else:
            continue
        missing += [] if found else [span]
    assert missing == []


def resolves(dotted: str) -> bool:
    """Whether nanollava.a.b is a module, or something in one."""
    found, *rest = importlib.import_module("nanollava"), *dotted.split(".")[1:]
    for name in rest:
        if not hasattr(found, name) and importlib.util.find_spec(f"{found.__name__}.{name}") is None:
            return False
        found = getattr(found, name, None) or importlib.import_module(f"{found.__name__}.{name}")
    return True


@every
def test_measured_numbers_of_the_prose_are_printed_beside_it(file):
    """Decimals and percentages; sections, equations and versions are not measured."""
    all_cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    unseen = []
    for number, cell in enumerate(all_cells):
        if cell["cell_type"] != "markdown":
            continue
        told = NOT_MEASURED.sub("", text(cell))
        beside = [other for other in all_cells[max(0, number - 4) : number + 5] if other["cell_type"] == "code"]
        printed = "\n".join(text(other) + "\n".join(outputs(other, "text/plain")) for other in beside)
        numbers = re.findall(r"(?<![\w.])\d+\.\d+(?!\w)|(?<![\w.])\d+(?=%)", told.replace(",", ""))
        unseen += [found for found in numbers if found not in printed.replace(",", "")]
    assert unseen == []
