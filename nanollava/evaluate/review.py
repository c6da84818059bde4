"""What the judge of LLaVA-Bench is asked: the official files, matched by id, become one request for each question.

The judge sees no picture either. It is told what the picture shows (COCO: captions and boxes; In-the-Wild: a caption
written by hand), the question, the reference's answer, always first, the model's, and how to score the two.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanollava.error import Error, printable
from nanollava.evaluate.answers import digest
from nanollava.evaluate.lines import check_complete, check_known, is_text, read_lines
from nanollava.evaluate.replies import chat, rule
from nanollava.instruct import contexts
from nanollava.instruct.contexts import Context
from nanollava.instruct.teacher import Request

CATEGORIES = ("conv", "detail", "complex")
WILD = "llava_bench_"  # what the official rules and reviews of In-the-Wild have in front of a category

FRAME = (
    "[Context]\n{context}\n\n[Question]\n{question}\n\n"
    "[Assistant 1]\n{reference}\n\n[End of Assistant 1]\n\n[Assistant 2]\n{answer}\n\n[End of Assistant 2]\n\n"
    "[System]\n{rule}\n\n"
)  # the official one


@dataclass(frozen=True)
class Files:
    """The four inputs of a judgement, JSON lines in the official formats."""

    questions: Path  # question_id, image, text, category
    context: Path  # image, and "captions" with "instances" or a "caption"
    reference: Path  # question_id, text
    answers: Path  # question_id, text


def requests(files: Files) -> Iterator[tuple[Request, dict]]:
    """A request for each question, its id the key, and the fields of the review that are known before the reply.

    Raises Error, naming file and id, where the files do not fit together.
    """
    questions = read_lines(files.questions, texts=("image", "text", "category"))
    shown, prefix = read_contexts(files.context)
    references = read_matched(files.reference, questions, files, "fetch the whole file")
    answers = read_matched(files.answers, questions, files, "the command that wrote it goes on where it stopped")
    for key, question in questions.items():
        category = prefix + check_category(key, question, references[key], files)
        if question["image"] not in shown:
            problem = f"image {printable(question['image'], 100)} of question_id {key} is not in it"
            raise Error(f"{files.context}: {problem}; give the context file of the same benchmark")
        context = shown[question["image"]]
        parts = {"question": question["text"], "reference": references[key]["text"], "answer": answers[key]["text"]}
        user = FRAME.format(context=context.text(boxes=True), rule=rule(category), **parts)
        known = {
            "question_id": question["question_id"], "category": category, "model_id": answers[key].get("model_id", ""),
            "answer1_id": name(references[key]), "answer2_id": name(answers[key]),
        }  # fmt: skip
        yield Request(key, chat(rule("system"), user), "judge", context), known


def read_matched(file: Path, questions: dict[str, dict], files: Files, remedy: str) -> dict[str, dict]:
    """The texts of a file by question_id: one for each question, whatever their order."""
    rows = read_lines(file, texts=("text",))
    check_known(file, rows, questions, files.questions)
    check_complete(file, questions, rows, remedy)
    return rows


def check_category(key: str, question: dict, reference: dict, files: Files) -> str:
    """The question's category. Raises Error where there is no rule for it, or the reference has another."""
    category = question["category"].removeprefix(WILD)
    if category not in CATEGORIES:
        problem = f"category {printable(repr(category), 100)} has no rule, only {', '.join(CATEGORIES)} have"
        raise Error(f"{files.questions}: question_id {key}: {problem}; mend it")
    told = str(reference.get("category", category)).removeprefix(WILD)
    if told != category:
        problem = f"category {printable(repr(told), 100)}, but {files.questions} says {category!r}"
        raise Error(f"{files.reference}: question_id {key}: {problem}; are these files of one benchmark?")
    return category


def read_contexts(file: Path) -> tuple[dict[str, Context], str]:
    """What is said of each image, by its name, and what the names of the rules that go with it begin with. In-the-Wild
    has "caption", a text or a list of them; COCO what instruction data is made of. Raises Error on a malformed line."""
    rows = read_lines(file, "image")
    if not any("caption" in row for row in rows.values()):
        return {context.image: context for context in contexts.read_lines(file)}, ""
    found = {}
    for image, row in rows.items():
        captions = [row.get("caption")] if isinstance(row.get("caption"), str) else row.get("caption")
        if not isinstance(captions, list) or not captions or not all(map(is_text, captions)):
            raise Error(f'{file}: image {printable(image, 100)}: "caption" must be a text or a list of them; mend it')
        found[image] = Context(image, image, captions)
    return found, WILD


def name(row: dict) -> object:
    """What a review calls an answer: its answer_id, or, where it has none, a digest of what it says."""
    return row.get("answer_id", digest(row["text"]))
