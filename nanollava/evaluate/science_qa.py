"""python -m nanollava.evaluate science-qa records | answer | ask | judge | score

ScienceQA (LLaVA section 5.2), from its two published files, in steps that can be stopped, gone on with, and read:
    records   training records of a split                                             -> train.json
    answer    a LLaVA answers the problems                                            -> answers.jsonl
    ask       a language model without eyes answers them too, GPT-4 in the paper      -> teacher.jsonl
    judge     and is asked again, shown both, where the two disagree                  -> judged.jsonl
    score     accuracy by subject, context and grade, alone and combined, beside the published rows
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from nanollava.error import Error, some
from nanollava.evaluate import tables
from nanollava.evaluate.answers import Asked, add_answer_options, answer_all, digest, placed
from nanollava.evaluate.lines import check_known, is_text, read_lines
from nanollava.evaluate.problems import FORMATS, Problem, make_record, prompt, question, read_problems
from nanollava.evaluate.replies import add_reply_options, ask_for_all, chat, rule
from nanollava.evaluate.science_scores import (
    Choices,
    accuracy,
    arbitrate,
    choose,
    complement,
    differing,
    extract_answer,
)
from nanollava.files import check_apart, write_whole
from nanollava.folder import read_json
from nanollava.instruct.teacher import Request
from nanollava.train.records import image_path

Problems = dict[str, Problem]


# ---------------------------------------------------------------- the steps


def records(args: argparse.Namespace) -> None:
    """Training records in the official format: images are named from the folder of the split's pictures."""
    check_apart(args.out, args.data / "problems.json", args.data / "pid_splits.json")
    made = [make_record(problem, args.prompt) for problem in read_problems(args.data, args.split).values()]
    write_whole(args.out, json.dumps(made))
    print(f"{args.out}: {len(made):,} records, {sum('image' in record for record in made):,} of them with an image")


def answer(args: argparse.Namespace) -> None:
    """The model's answers to the problems of a split, in the official format."""
    asked = []
    for i, problem in read_problems(args.data, args.split).items():
        with placed(f"{args.data / 'problems.json'}: problem {i}"):
            image = image_path(args.images, problem.image_name) if problem.image else None
        asked.append(Asked(i, question(problem, args.prompt), image))
    answer_all(args, asked)


def ask(args: argparse.Namespace) -> None:
    """A teacher's answers from the text alone, in the format of ``answer``. (The paper gave GPT-4 two examples; this
    gives a description of the format.)"""
    items = []
    for i, problem in read_problems(args.data, args.split).items():
        request = Request(i, chat(rule("science_answer"), prompt(problem, "QCM-LEA")), "science")
        items.append((request, {"question_id": i, "prompt": request.messages[-1]["content"]}))
    ask_for_all(args, items, lambda text: {"text": text})


def judge(args: argparse.Namespace) -> None:
    """A verdict of the teacher wherever the two answers differ."""
    problems = read_problems(args.data, args.split)
    ours, theirs = read_texts(args.answers, problems, args), read_texts(args.teacher_answers, problems, args)
    items = []
    for i in differing(choose(problems, ours), choose(problems, theirs)):
        request = Request(i, chat(rule("science_judge"), both(problems[i], ours.get(i), theirs.get(i))), "judge")
        items.append((request, {"question_id": i, "answers": stamp(i, ours, theirs)}))
    ask_for_all(args, items, lambda text: {"text": text})


def both(problem: Problem, ours: str | None, theirs: str | None) -> str:
    """What the judge reads: the problem and two solutions, and nothing of who wrote which."""
    solutions = (f"[Solution {n}]\n{text or 'none given'}\n" for n, text in ((1, ours), (2, theirs)))
    return "\n".join([f"[Problem]\n{prompt(problem, 'QCM-LEA')}\n", *solutions])


def stamp(i: str, ours: dict[str, str], theirs: dict[str, str]) -> str:
    """Which two answers a verdict is about."""
    return digest([ours.get(i), theirs.get(i)])


def read_texts(file: Path, problems: Problems, args: argparse.Namespace) -> dict[str, str]:
    """Answers by the problems' ids: JSON lines with question_id and text, or, from a .json file, the field "outputs" of
    ScienceQA's own GPT results. Raises Error for ids that the split does not have; those that are missing are wrong."""
    if file.suffix == ".json":
        texts = read_json(file, "check the path").get("outputs")
        if not isinstance(texts, dict) or not all(map(is_text, texts.values())):
            raise Error(f'{file}: needs the field "outputs", texts by id; or give JSON lines, named .jsonl')
    else:
        texts = {i: row["text"] for i, row in read_lines(file, texts=("text",)).items()}
    check_known(file, texts, problems, f"the split {args.split}")
    return texts


# ---------------------------------------------------------------- score


def score(args: argparse.Namespace) -> None:
    """Print the table: the model, and, where their files are given, the teacher and the two combinations."""
    problems = read_problems(args.data, args.split)
    ours = read_texts(args.answers, problems, args)
    rows, notes = {str(args.answers): choose(problems, ours)}, [note(args.answers, problems, ours)]
    if args.judged and not args.teacher_answers:
        raise Error(f"--judged {args.judged}: give the answers that it decides about too, with --teacher-answers")
    if args.teacher_answers:
        theirs = read_texts(args.teacher_answers, problems, args)
        notes.append(note(args.teacher_answers, problems, theirs))
        rows |= combine(problems, ours, theirs, args)
    shares = {name: accuracy(problems, choices).values() for name, choices in rows.items()}
    cells = [(name, ["-" if s is None else f"{s:.2f}" for s in row]) for name, row in shares.items()]
    print(f"ScienceQA, {len(problems):,} problems of the split {args.split}: percent right.\n")
    print(tables.markdown(tables.SCIENCE_COLUMNS, cells + list(tables.published(tables.SCIENCE_QA, 2).items())))
    for line in filter(None, notes):
        print(f"\n{line}")


def combine(
    problems: Problems, ours: dict[str, str], theirs: dict[str, str], args: argparse.Namespace
) -> dict[str, Choices]:
    """The rows of the teacher and of the combinations."""
    a, b = choose(problems, ours), choose(problems, theirs)
    rows = {str(args.teacher_answers): b, "complement": complement(a, b)}
    if args.judged:
        verdicts = choose(problems, read_verdicts(args.judged, differing(a, b), ours, theirs))
        rows["judge"] = arbitrate(a, b, verdicts)
        undecided = [i for i in differing(a, b) if verdicts[i] is None]
        if undecided:
            print(f"{args.judged}: without a verdict, so that the model's answer counts: {some(undecided)}\n")
    return rows


def read_verdicts(file: Path, asked: list[str], ours: dict[str, str], theirs: dict[str, str]) -> dict[str, str]:
    """What the judge said. Raises Error for verdicts on other answers than these."""
    rows = read_lines(file, texts=("text",)) if asked else {}
    check_known(file, rows, asked, "the list of answers that differ")
    for i, row in rows.items():
        if row.get("answers") != stamp(i, ours, theirs):
            raise Error(f"{file}: problem {i}: the verdict is on other answers; judge these into another --out")
    return {i: row["text"] for i, row in rows.items()}


def note(file: Path, problems: Problems, texts: dict[str, str]) -> str:
    """What of a file counts as wrong without having been compared; "" where nothing does."""
    letters = {i: extract_answer(text) for i, text in texts.items()}
    found = {
        "no answer": [i for i in problems if i not in texts],
        "no letter in it": [i for i, letter in letters.items() if letter is None],
        "none of the choices": [i for i, letter in letters.items() if letter and letter not in problems[i].letters],
    }
    told = "; ".join(f"{what} {some(ids)}" for what, ids in found.items() if ids)
    return f"{file}: counted as wrong: {told}" if told else ""


# ---------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    """Run a step; returns the exit status. Raises Error."""
    args = make_parser().parse_args(argv)
    args.run(args)
    return 0


def make_parser() -> argparse.ArgumentParser:
    prog, raw = "python -m nanollava.evaluate science-qa", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.partition("\n\n")[2], formatter_class=raw)
    steps = parser.add_subparsers(required=True, metavar="records|answer|ask|judge|score")

    step = add_step(steps, records, "training records of a split", split="train")
    add_format(step)
    step.add_argument("--out", type=Path, required=True, help="the JSON file for train.py's --data")

    step = add_step(steps, answer, "a LLaVA answers the problems")
    add_format(step)
    step.add_argument("--images", type=Path, required=True, help="the split's pictures: ID/image.png in this folder")
    add_answer_options(step, longest=1024)

    step = add_step(steps, ask, "a teacher answers them, from the text alone")
    add_reply_options(step)

    step = add_step(steps, judge, "the teacher decides where the two answers differ")
    add_answers(step, required=True)
    add_reply_options(step)

    step = add_step(steps, score, "accuracy in the paper's columns")
    add_answers(step, required=False)
    step.add_argument("--judged", type=Path, help="what judge has written")
    return parser


def add_step(steps, run: Callable, told: str, split: str = "test") -> argparse.ArgumentParser:
    step = steps.add_parser(run.__name__, help=told)
    step.set_defaults(run=run)
    step.add_argument("--data", type=Path, required=True, help="the folder of problems.json and pid_splits.json")
    step.add_argument("--split", default=split, help=f"one of those in pid_splits.json ({split})")
    return step


def add_format(step: argparse.ArgumentParser) -> None:
    told = "the paper's, or v1.5's, in which a model answers with the letter alone (QCM-LEA)"
    step.add_argument("--prompt", choices=FORMATS, default="QCM-LEA", help=told)


def add_answers(step: argparse.ArgumentParser, required: bool) -> None:
    step.add_argument("--answers", type=Path, required=True, help="the model's answers")
    told = "what ask has written, or ScienceQA's own file of GPT-4's answers (.json)"
    step.add_argument("--teacher-answers", type=Path, required=required, help=told)
