"""python -m nanollava.evaluate llava-bench answer | judge | table

LLaVA-Bench (LLaVA section 5.1), COCO and In-the-Wild, in steps that can each be stopped, gone on with, and read:
    answer   a model answers the questions                                                -> answers.jsonl
    judge    a language model, told in words what each picture shows, scores the
             reference's answer and the model's, side by side                             -> reviews.jsonl
    table    the model's scores in percent of the reference's, by category, beside the published ones
"""

import argparse
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanollava.error import Error, printable, some
from nanollava.evaluate import review, tables
from nanollava.evaluate.answers import Asked, add_answer_options, answer_all, placed
from nanollava.evaluate.lines import read_lines
from nanollava.evaluate.replies import add_reply_options, ask_for_all
from nanollava.instruct.contexts import is_number
from nanollava.train.records import image_path

Pair = tuple[float, float]  # scores of the reference and of the model
NO_SCORES = (-1.0, -1.0)  # how the official script counts a review without scores


# ---------------------------------------------------------------- scores


def parse_scores(text: str, strict: bool = False) -> Pair | None:
    """The two scores, (reference, model), on the first line of a review; None where they are not there.

    The line must hold two finite numbers and nothing else. Commas count as spaces, and white space may stand before,
    behind and between them, as much as there is: "8 7", "8,7", "8, 7", "8 7 ".
    strict: as the official script reads it: commas become spaces, then the line is split at single spaces and must give
    exactly two numbers, so "8, 7" and "8 7 " have none.
    """
    line = text.partition("\n")[0].replace(",", " ")
    try:
        reference, model = map(float, line.split(" ") if strict else line.split())
    except ValueError:
        return None
    return (reference, model) if math.isfinite(reference) and math.isfinite(model) else None


def relative_score(pairs: Iterable[Pair | None]) -> float:
    """The model's scores in percent of the reference's, from (reference, model) pairs: a ratio of means, not a mean of
    ratios (LLaVA section 5.1). Reviews without scores, (-1, -1) or None, count as -1, -1 as in the official script,
    which also rounds both means to three decimals first. The tables print one: (8, 4), (2, 2), (-1, -1) give
    100 * 1.667 / 3, "55.6".

    Raises Error without pairs, and where the reference's mean is 0.
    """
    reference, model = means(pairs)
    if reference == 0:
        raise Error("relative score: the mean of the reference's scores is 0, so nothing is a percentage of it")
    return 100 * model / reference


def means(pairs: Iterable[Pair | None]) -> Pair:
    """Mean score of the reference and of the model, each rounded to three decimals. Raises Error without pairs."""
    scores = [pair or NO_SCORES for pair in pairs]
    if not scores:
        raise Error("relative score: there are no reviews to take the mean of")
    reference, model = np.asarray(scores, dtype=float).mean(axis=0).tolist()
    return round(reference, 3), round(model, 3)


# ---------------------------------------------------------------- the steps


def answer(args: argparse.Namespace) -> None:
    """The model's answers to all questions, in the official format."""
    questions = read_lines(args.questions, texts=("image", "text")).values()
    asked = []
    for q in questions:
        with placed(f"{args.questions}: question_id {q['question_id']}"):
            asked.append(Asked(q["question_id"], q["text"], find_image(args.images, q["image"])))
    answer_all(args, asked)


def find_image(folder: Path, name: str) -> Path:
    """A picture under the questions' name for it, or under that which it has in COCO's own val2014."""
    image = image_path(folder, name)
    original = image.parent / f"COCO_val2014_{image.name}"
    return original if os.path.isfile(original) and not os.path.isfile(image) else image


def judge(args: argparse.Namespace) -> None:
    """A review of each answer, in the official format, and the table of them."""
    files = review.Files(args.questions, args.context, args.reference, args.answers)
    ask_for_all(args, list(review.requests(files)), read_review)
    show([read_reviews(args.out, strict=False)])


def read_review(text: str) -> dict:
    """The fields of a review that its text gives."""
    return {"content": text, "tuple": parse_scores(text) or NO_SCORES}


def table(args: argparse.Namespace) -> None:
    """The table of one or several files of reviews."""
    show([read_reviews(file, args.strict) for file in args.reviews])


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Reviews:
    """What a file of reviews says.

    pairs: the scores by category, and of "all"; a review without scores is in them as NO_SCORES.
    without: the question_ids of these.
    """

    file: Path
    model: str
    judge: str
    wild: bool  # In-the-Wild, not COCO
    pairs: dict[str, list[Pair]]
    without: list[str]

    def rows(self) -> list[tuple[str, list[str]]]:
        """The file's rows of the table, named."""
        return [
            (self.model, self.cells(lambda pairs: f"{relative_score(pairs):.1f}")),
            ("its mean score x 10", self.cells(lambda pairs: f"{10 * means(pairs)[1]:.1f}")),
            ("the reference's x 10", self.cells(lambda pairs: f"{10 * means(pairs)[0]:.1f}")),
            ("reviews", [str(len(pairs)) for pairs in self.pairs.values()]),
        ]

    def cells(self, value: Callable[[list[Pair]], str]) -> list[str]:
        """What ``value`` makes of each category; "-" where no review has scores: -1 / -1 would be 100%."""
        try:
            return [value(pairs) if set(pairs) - {NO_SCORES} else "-" for pairs in self.pairs.values()]
        except Error as error:
            raise Error(f"{self.file}: {error}") from error


def read_reviews(file: Path, strict: bool) -> Reviews:
    """Scores are read anew from the reviews' own text ("content"); where a file has none, its "tuple" counts.

    Raises Error for a category of neither benchmark, and for reviews of both in one file.
    """
    pairs: dict[str, list[Pair]] = {category: [] for category in (*review.CATEGORIES, "all")}
    rows, without = read_lines(file, texts=("category",)), []
    for key, row in rows.items():
        category = row["category"].removeprefix(review.WILD)
        if category not in review.CATEGORIES:
            raise Error(f"{file}: question_id {key}: category {printable(repr(category), 100)}: there is none such")
        scores = read_scores(row, strict, f"{file}: question_id {key}")
        without += [key] if scores == NO_SCORES else []
        pairs[category].append(scores)
        pairs["all"].append(scores)
    benchmarks = {row["category"].startswith(review.WILD) for row in rows.values()}
    if len(benchmarks) > 1:
        raise Error(f"{file}: holds reviews of both benchmarks, COCO and In-the-Wild; keep two files")
    model, judge = row.get("model_id") or file.stem, row.get("teacher") or "an unnamed judge"
    return Reviews(file, printable(str(model), 100), printable(str(judge), 100), benchmarks.pop(), pairs, without)


def read_scores(row: dict, strict: bool, place: str) -> Pair:
    """The scores of a review, NO_SCORES where it gives none."""
    if isinstance(row.get("content"), str):
        return parse_scores(row["content"], strict) or NO_SCORES
    pair = row.get("tuple")
    if not isinstance(pair, list) or len(pair) != 2 or not all(map(is_number, pair)):
        raise Error(f'{place}: needs "content", the text of the review, or "tuple", its two scores; judge it again')
    return float(pair[0]), float(pair[1])


def show(files: list[Reviews]) -> None:
    """Print the table, and what there is to know of its figures. Raises Error where a judge never gave scores."""
    wild = files[0].wild
    if odd := [f.file for f in files if f.wild != wild]:
        raise Error(f"{odd[0]}: is of the other benchmark than {files[0].file}; make two tables")
    judges = " and ".join(dict.fromkeys(f.judge for f in files))
    print(f"LLaVA-Bench ({'In-the-Wild' if wild else 'COCO'}), percent of the reference's scores, judged by {judges}.")
    print("The published rows were judged by gpt-4-0314: figures of other judges do not compare with them.\n")
    rows = [row for f in files for row in f.rows()]
    rows += tables.published(tables.BENCH_WILD if wild else tables.BENCH_COCO, 1).items()
    print(tables.markdown(tables.BENCH_COLUMNS, rows))
    for f in files:
        if f.without:
            print(f"\n{f.file}: reviews without scores, counted as -1, -1 as in the official script: {some(f.without)}")
    if mute := [f for f in files if len(f.without) == len(f.pairs["all"])]:
        problem = f"none of the {len(mute[0].without)} reviews has scores on its first line"
        remedy = "read a few: they may be read without --strict, or another --teacher may judge into another --out"
        raise Error(f"{mute[0].file}: {problem}; {remedy}")


# ---------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    """Run a step; returns the exit status. Raises Error."""
    args = make_parser().parse_args(argv)
    args.run(args)
    return 0


def make_parser() -> argparse.ArgumentParser:
    prog, raw = "python -m nanollava.evaluate llava-bench", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.partition("\n\n")[2], formatter_class=raw)
    steps = parser.add_subparsers(required=True, metavar="answer|judge|table")
    step = steps.add_parser("answer", help="a model answers the questions")
    step.add_argument("--questions", type=Path, required=True, help="question_id, image, text, category: JSON lines")
    step.add_argument("--images", type=Path, required=True, help="the folder of the pictures")
    add_answer_options(step, longest=1024)
    step.set_defaults(run=answer)
    step = steps.add_parser("judge", help="another model scores reference and answer")
    step.add_argument("--questions", type=Path, required=True, help="the same file")
    step.add_argument("--context", type=Path, required=True, help="what the pictures show: captions, boxes")
    step.add_argument("--reference", type=Path, required=True, help="GPT-4's answers, or others to compare with")
    step.add_argument("--answers", type=Path, required=True, help="the model's answers")
    add_reply_options(step)
    step.set_defaults(run=judge)
    step = steps.add_parser("table", help="scores by category, beside the published ones")
    step.add_argument("reviews", type=Path, nargs="+", metavar="REVIEWS", help="what judge has written")
    step.add_argument("--strict", action="store_true", help='read scores as the official script does: "8, 7" has none')
    step.set_defaults(run=table)
    return parser
