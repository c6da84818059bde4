"""What the README says is true: files, line counts, commands."""

import argparse
import ast
import importlib
import json
import random
import re
import shlex
import textwrap
from pathlib import Path

import pytest

import train
from nanollava.checkpoint import load
from nanollava.instruct.contexts import Context
from nanollava.instruct.replies import record_of, turns_of
from nanollava.miniature import language, pretrain, recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(  # of the list of all files: a link from its folder, lines
    r"^\| .* \| \[`[\w/.]+`\]\(([\w/.]+\.py)\) \| (\d+) \|$",
    (ROOT / "nanollava/README.md").read_text(encoding="utf-8"), flags=re.M,
)  # fmt: skip
LISTED = [(ROOT / "nanollava" / link).resolve().relative_to(ROOT).as_posix() for link, _ in ROWS]
PLUMBING = ("error", "files", "folder", "config", "progress", "train/machine")


def test_line_counts_are_those_of_the_files():
    for file, (_, lines) in zip(LISTED, ROWS, strict=True):
        assert (ROOT / file).read_text(encoding="utf-8").count("\n") == int(lines), file


def test_every_file_of_the_source_is_listed_once():
    files = {file.relative_to(ROOT).as_posix() for file in (ROOT / "nanollava").rglob("*.py")}
    plumbing = {f"nanollava/{name}.py" for name in PLUMBING}
    commands = {f"nanollava/{name}/__main__.py" for name in ("bench", "evaluate", "instruct")}
    expected = {file for file in files if not file.endswith(("__init__.py", "__main__.py"))} - plumbing | commands
    assert sorted(LISTED) == sorted(expected | {"train.py", "chat.py"})


def test_every_file_that_is_named_exists():
    names = re.findall(r"`((?:nanollava|weights|tests)/[\w./]+|\w+\.py|Makefile|requirements\.txt)`", README)
    known = {Path(file).name for file in LISTED} | {f"{Path(name).name}.py" for name in PLUMBING}
    assert [name for name in names if name not in known and not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "nanollava/README.md", "weights/miniature/README.md"])
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text(encoding="utf-8"))
    inside = [link for link in links if not link.startswith("http")]
    assert inside and [link for link in inside if not ((ROOT / page).parent / link).exists()] == []


@pytest.mark.parametrize("line", re.findall(r"^(?: {4})?python train\.py ((?:.*\\\n)*.*)$", README, flags=re.M))
def test_every_training_command_is_understood(line):
    words = shlex.split(line.replace("\\\n", " "), comments=True)
    assert train.make_parser().parse_args(words).run


class Understood(BaseException):
    """Raised where a command line has been read and work would begin."""


@pytest.mark.parametrize("line", re.findall(r"^(?: {4})?python -m (nanollava(?:.*\\\n)*.*)$", README, flags=re.M))
def test_every_command_of_a_module_is_understood(line, monkeypatch):
    module, *words = shlex.split(line.replace("\\\n", " "), comments=True)
    elsewhere = {"nanollava.train.data": "nanollava.train.check", "nanollava.checkpoint": "nanollava.convert"}
    package = (ROOT / module.replace(".", "/")).is_dir()
    main = importlib.import_module(f"{module}.__main__" if package else elsewhere.get(module, module)).main
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, args=None, namespace=None):
        found = parse(self, args, namespace)
        if not hasattr(found, "rest"):  # that of another command, which reads them itself
            raise Understood
        return found

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    with pytest.raises(Understood):
        main(words)


def test_the_record_that_is_shown_is_made_of_the_reply_that_is_shown():
    shown = re.search(r"^what the teacher reads.*?^```", README, flags=re.M | re.S)[0]
    parts = [textwrap.dedent(part).strip() for part in re.split(r"^(?:what it writes|the record) ", shown, flags=re.M)]
    record = json.loads(parts[2].removesuffix("```"))
    boxes = [line.strip().partition(": ") for line in parts[0].splitlines()[2:]]
    instances = [{"category": category, "bbox": json.loads(box)} for category, _, box in boxes]
    context = Context(record["id"], record["image"], ["A large purple triangle and a large green circle."], instances)
    told = "\n".join(line.strip() for line in parts[0].splitlines()).replace("what the teacher reads     ", "")
    assert context.text(boxes=True) == told.replace("   (one of five captions)", "")
    reply = "\n".join(line.strip() for line in parts[1].splitlines())
    turns = turns_of("reasoning", reply)
    made = [record_of(context, "reasoning", turns, random.Random(seed)) for seed in range(20)]
    assert record in made


def test_nothing_is_left_to_be_filled_in():
    assert not re.findall(r"@[A-Z0-9]+@|TO[D]O|XX[X]", README)


def test_every_flag_that_is_named_exists():
    sources = [ROOT / "train.py", ROOT / "chat.py", *(ROOT / "nanollava").rglob("*.py")]
    known = {
        flag for file in sources for flag in re.findall(r'"(--[a-z][a-z0-9-]+)"', file.read_text(encoding="utf-8"))
    }
    known |= {"--local-dir", "--nproc-per-node"}  # of hf and torchrun
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", README))
    assert named and named <= known


def test_files_stand_below_those_that_they_import():
    for number, file in enumerate(LISTED):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        for node in (node for node in tree.body if isinstance(node, ast.ImportFrom)):
            modules = [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
            for found in {f"{module.replace('.', '/')}.py" for module in modules} & set(LISTED):
                assert LISTED.index(found) < number, f"{file} imports {found}"


def test_the_bundled_model_is_the_one_that_this_code_makes_and_says_what_is_printed():
    steps = recipe.RECIPES["demo"].stage2_steps
    assert f"stage2  {steps}/{steps}  loss" in README
    model = load(ROOT / "weights/miniature")
    assert model.config.vision == pretrain.VISION
    assert model.config.language == pretrain.language_config(model.tokenizer)
    conversation = re.findall(r"^> (.+)\n(.+)$", README, flags=re.M)
    assert len(conversation) == 6
    for question, answer in conversation:
        assert model.answer(ROOT / "weights/miniature/sample.png", question) == answer
    assert all(answer in right_answers(question) for question, answer in conversation)


def right_answers(question: str) -> set[str]:
    """What the teacher answers about sample.png."""
    rng, scene = random.Random(0), recipe.SAMPLE
    assert scene.split == "test"
    asked = [language.ask(scene, kind, rng) for kind in language.KINDS for _ in range(500)]
    asked += [language.describe(scene, rng) for _ in range(50)]
    return {q.answer for q in asked if q.text == question}
