"""The notebooks as they are committed: run to their end, pictures kept, prose that says nothing untrue."""

import ast
import base64
import importlib
import json
import re
from itertools import groupby
from pathlib import Path
from statistics import median

import pytest
import torch

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOURCES = [*(ROOT / "nanollava").rglob("*.py"), ROOT / "train.py", ROOT / "chat.py", ROOT / "notebooks/figures.py"]
NOT_MEASURED = re.compile(
    r"```.*?```|`[^`]*`|\$[^$]*\$|\]\([^)]*\)|[-v]\d\.\d|\n\| \d+ \|"
    r"|(section|equation|table|figure|notebook)s?\s[\d.]+",
    re.S,
)
OF_THE_PAPER = {  # and of its models: sizes of tower, language model, recipes and CLIP's batch; records; a year
    *("14", "16", "24", "32", "128", "224", "256", "336", "576", "588", "1024", "2048", "4096", "32000"),
    *("12", "2023", "32768", "158000", "595000"),
}
DRAWING = {"show", "tokens", "architecture"}  # of a figure to its end, as plt.show() is
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


def defined_in(tree: ast.AST) -> set[str]:
    """Every name that a piece of Python defines: functions, classes, arguments, what is assigned or imported."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).rpartition(".")[2])
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


def used_in(code: str) -> set[str]:
    """Every name in a piece of Python."""
    fields = ("id", "attr", "arg", "name")
    return {name for node in ast.walk(ast.parse(code)) for field in fields if (name := getattr(node, field, None))}


TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in SOURCES}
TORCH = {"weight", "bias"}.union(*map(dir, (torch, torch.Tensor, torch.nn, torch.nn.functional)))
KNOWN = TORCH.union(*map(defined_in, TREES.values()))
OWNERS = {file.stem: defined_in(tree) for file, tree in TREES.items()}  # of modules and classes
for node in (node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
    OWNERS[node.name] = defined_in(node) | OWNERS.get(node.name, set())


def test_they_are_numbered_without_a_gap():
    assert FILES and [int(file.name[:2]) for file in FILES] == list(range(len(FILES)))


def test_the_folder_is_small():
    assert sum(file.stat().st_size for file in (ROOT / "notebooks").rglob("*") if file.is_file()) < MOST_BYTES


@every
def test_it_was_run_from_its_first_cell_to_its_last(file):
    code = cells(file, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    said = [out for cell in code for out in cell["outputs"]]
    assert not [out for out in said if out["output_type"] == "error" or out.get("name") == "stderr"]
    printed = [line for cell in code for out in outputs(cell, "text/plain") for line in out.splitlines()]
    assert [line for line in printed if len(line) > 98] == []  # GitHub breaks longer ones within words


@every
def test_cells_that_draw_have_their_figure_and_it_is_no_wider_than_it_is_shown(file):
    drawing = [cell for cell in cells(file, "code") if draws(text(cell))]
    assert drawing and [text(cell) for cell in drawing if not outputs(cell, "image/png")] == []
    pictures = [base64.b64decode(png) for cell in drawing for png in outputs(cell, "image/png")]
    widths = [int.from_bytes(png[16:20], "big") for png in pictures]  # the first field of a PNG's header
    assert min(widths) > 0 and max(widths) <= 900


def draws(code: str) -> bool:
    """Whether a cell shows a figure, and not only defines what would."""
    statements = [node for node in ast.parse(code).body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    calls = [node for one in statements for node in ast.walk(one) if isinstance(node, ast.Call)]
    return any(ast.unparse(call.func) in {"plt.show", *DRAWING} for call in calls)


@every
def test_cells_are_short_and_stand_between_prose(file):
    code = cells(file, "code")
    assert sum(bool(words.strip()) for words in prose(file)) >= 0.6 * len(code)
    kinds = [cell["cell_type"] for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]]
    assert max(len(list(run)) for kind, run in groupby(kinds) if kind == "code") <= 5
    assert median(text(cell).count("\n") + 1 for cell in code) <= 8


@every
def test_it_opens_with_what_it_is_for_and_ends_in_exercises_with_solutions(file):
    first, all_prose = prose(file)[0], "\n".join(text(cell) for cell in cells(file, "markdown"))
    assert first.startswith(f"# {int(file.name[:2])}. ") and "*In the paper*" in first and "At the end" in first
    exercises = all_prose.partition("## Exercises")[2]
    asked = re.findall(r"^\*\*(\d)\.\*\*", exercises, flags=re.M)
    assert asked == [str(number + 1) for number in range(len(asked))] and 3 <= len(asked) <= 5
    solutions = re.findall(r"^<details><summary>Solution</summary>\n\n(.+?)\n</details>$", exercises, re.M | re.S)
    assert len(solutions) == len(asked)
    code = re.findall(r"^```python\n(.*?)^```", "\n".join(solutions), flags=re.M | re.S)
    assert code and max(len(line) for block in code for line in block.splitlines()) <= 95


@every
def test_links_lead_somewhere(file):
    links = re.findall(r"\]\(([^)]+)\)|(?:href|src)=[\"']([^\"']+)", "\n".join(prose(file)))
    inside = [link for pair in links for link in pair if link and not link.startswith("http")]
    assert inside and [link for link in inside if not (file.parent / link).exists()] == []


def test_terms_of_the_glossary_stand_in_korean_in_the_notebooks_that_it_names():
    glossary = (ROOT / "notebooks" / "GLOSSARY.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .+ \| (.+) \| .+ \| ([\d, ]+) \|$", glossary, flags=re.M)
    missing = [
        (term, numbers)
        for terms, numbers in rows
        for term in terms.split(", ")
        if not all(term in " ".join(" ".join(prose(FILES[int(n)])).split()) for n in numbers.split(", "))
    ]
    assert len(rows) > 50 and missing == []


@every
def test_what_is_named_exists(file):
    known = KNOWN | set().union(*(used_in(text(cell)) for cell in cells(file, "code")))
    spans = re.findall(r"`([^`\n]+)`", "\n".join(prose(file)))
    assert [span for span in spans if not exists(span, known, file.parent)] == []


def exists(span: str, known: set[str], folder: Path) -> bool:
    """Whether there is what a piece of code in the prose names; pieces that name nothing are left out."""
    span = re.sub(r"\(.*\)$", "", span)  # a call
    if re.fullmatch(r"[\w/.-]+\.(py|ipynb|md)|(nanollava|tests|weights)/[\w./-]+", span):
        inside = [ROOT / span, ROOT / "nanollava" / span, folder / span]
        return any(path.exists() for path in inside) or span in {source.name for source in SOURCES}
    if re.fullmatch(r"--[a-z-]+", span):
        return any(f'"{span}"' in source.read_text(encoding="utf-8") for source in SOURCES)
    if span.startswith("nanollava."):
        return resolves(span)
    if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", span) and not span.endswith((".json", ".jsonl")):
        owner, _, name = span.rpartition(".")
        return name in OWNERS.get(owner.rpartition(".")[2], known)
    return True


def resolves(dotted: str) -> bool:
    """Whether nanollava.a.b is a module, or something in one."""
    found, *rest = importlib.import_module("nanollava"), *dotted.split(".")[1:]
    for name in rest:
        if not hasattr(found, name) and importlib.util.find_spec(f"{found.__name__}.{name}") is None:
            return False
        found = getattr(found, name, None) or importlib.import_module(f"{found.__name__}.{name}")
    return True


@every
def test_numbers_of_the_prose_stand_beside_it(file):
    """Decimals and percentages are printed there; what is counted, from two digits on, is printed or in the code.
    Sections, equations and versions are left out, and exercises: they ask for numbers."""
    all_cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    unseen = []
    for number, cell in enumerate(all_cells):
        if cell["cell_type"] != "markdown":
            continue
        told = NOT_MEASURED.sub("", text(cell).partition("## Exercises")[0]).replace(",", "")
        beside = [other for other in all_cells[max(0, number - 4) : number + 5] if other["cell_type"] == "code"]
        printed = "\n".join("\n".join(outputs(other, "text/plain")) for other in beside).replace(",", "")
        shown = "\n".join("\n".join(outputs(other, "text/markdown")) for other in beside)
        code = (shown + "\n".join(map(text, beside))).replace("_", "")
        measured = re.findall(r"(?<![\w.])\d+\.\d+(?!\w)|(?<![\w.])\d+(?=%)", told)
        counted = re.findall(r"(?<![\w.-])\d{2,}(?![\w.%-])", told)
        unseen += [found for found in measured if not re.search(rf"(?<![\d.]){re.escape(found)}(?!\d)", printed)]
        counted = [found for found in counted if found not in OF_THE_PAPER]
        unseen += [found for found in counted if not re.search(rf"(?<!\d){found}(?!\d)", printed + code)]
    assert unseen == []


def test_recorded_speeds_are_those_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = [text(cell) for cell in cells(FILES[9], "code") if "RECORDED = {" in text(cell)]
    recorded = ast.literal_eval(re.search(r"RECORDED = (\{.*?^\})", code, re.M | re.S)[1])
    rates = [(rate, unit) for (_, unit), named in recorded.items() for rate in named.values()]
    assert len(rates) > 10
    assert [pair for pair in rates if not re.search(r"\| {:,}0? {} \|".format(*pair), readme)] == []
