"""What the README says is true: files, line counts, commands."""

import random
import re
import shlex
from pathlib import Path

import pytest

import train
from nanollava.checkpoint import load
from nanollava.miniature import language, pretrain, recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_line_counts_are_those_of_the_files():
    rows = re.findall(r"^\|.*\| \[`?([\w/.]+)`?\]\(\1\) \| (\d+) \|$", README, flags=re.M)
    assert len(rows) >= 12
    for file, lines in rows:
        assert (ROOT / file).read_text(encoding="utf-8").count("\n") == int(lines), file


def test_every_file_that_is_named_exists():
    names = re.findall(r"`((?:nanollava|weights|tests)/[\w./]+|\w+\.py|Makefile|requirements\.txt)`", README)
    assert names and all((ROOT / name).exists() for name in names)


@pytest.mark.parametrize("line", re.findall(r"^(?: {4})?python train\.py ((?:.*\\\n)*.*)$", README, flags=re.M))
def test_every_training_command_is_understood(line):
    words = shlex.split(line.replace("\\\n", " "), comments=True)
    assert train.make_parser().parse_args(words).run


def test_every_flag_that_is_named_exists():
    parser = train.make_parser()
    stages = next(a for a in parser._actions if a.choices).choices
    known = {flag for p in stages.values() for a in p._actions for flag in a.option_strings}
    known |= {"--image", "--ask", "--base", "--as", "--fp16", "--world"}  # of chat, nanollava.checkpoint and .evaluate
    known |= {"--local-dir"}  # of hf
    known |= {"--nproc-per-node"}  # of torchrun
    known |= {"--int8"}  # of chat and nanollava.evaluate
    known |= {"--quick", "--ladder", "--models", "--folder"}  # of nanollava.bench
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", README)) <= known


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
