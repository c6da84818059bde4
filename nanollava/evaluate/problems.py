"""ScienceQA's problems, as problems.json and pid_splits.json have them, become prompts, answers and training records.

A prompt format names what is asked and what is answered, each letter a part: Question, Context (the hint), Multiple
choices; Lecture, Explanation (the solution), Answer. QCM-LEA is LLaVA's (section 5.2), CQM-A that of v1.5.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nanollava.error import Error, printable, some
from nanollava.evaluate.lines import is_text
from nanollava.folder import read_json

LETTERS = "ABCDE"
GRADES = [str(grade) for grade in range(1, 13)]
FORMATS = ("QCM-LEA", "CQM-A")
SUBJECTS = ("natural science", "social science", "language science")
LETTER_ONLY = "Answer with the option's letter from the given choices directly."  # v1.5's words behind CQM


@dataclass(frozen=True)
class Problem:
    """One problem: the fields of problems.json that matter here."""

    id: str
    question: str
    choices: list[str]
    answer: int  # which of the choices
    hint: str
    image: str | None  # the name of its file; the folder has the problem's id
    lecture: str
    solution: str
    subject: str  # one of SUBJECTS
    grade: int  # 1 to 12

    @property
    def letters(self) -> str:
        """Those of its choices."""
        return LETTERS[: len(self.choices)]

    @property
    def image_name(self) -> str | None:
        return f"{self.id}/{self.image}" if self.image else None


def read_problems(folder: Path, split: str) -> dict[str, Problem]:
    """The problems of a split ("train", "val", "test", ...) by id, in the order of pid_splits.json.

    Raises Error, naming file, id and field, where a file or the split is missing, or a problem is malformed.
    """
    missing = "--data names the folder of ScienceQA's problems.json and pid_splits.json"
    problems, splits = (read_json(folder / name, missing) for name in ("problems.json", "pid_splits.json"))
    ids = splits.get(split)
    if not isinstance(ids, list) or not ids or not all(isinstance(i, str) for i in ids):
        known = ", ".join(name for name, value in splits.items() if value)
        raise Error(f"{folder / 'pid_splits.json'}: has no list of ids for --split {split}; there are {known}")
    if absent := [printable(i, 100) for i in ids if i not in problems]:
        raise Error(f"{folder / 'problems.json'}: ids of the split {split} are missing: {some(absent)}; fetch it again")
    if len(set(ids)) < len(ids):
        twice = [i for i in dict.fromkeys(ids) if ids.count(i) > 1]
        raise Error(f"{folder / 'pid_splits.json'}: ids of {split} are there twice: {some(twice)}; fetch it again")
    return {i: make_problem(i, problems[i], folder / "problems.json") for i in ids}


def make_problem(name: str, fields: object, file: Path) -> Problem:
    """Raises Error where a field is missing or of the wrong kind."""
    place = f"{file}: problem {printable(name, 100)}"
    if not isinstance(fields, Mapping):
        raise Error(f"{place}: is no object; fetch the file again")
    texts = {text: fields.get(text) for text in ("question", "hint", "lecture", "solution", "subject")}
    choices, answer, image = (fields.get(field) for field in ("choices", "answer", "image"))
    grade = str(fields.get("grade", "")).removeprefix("grade")
    choices_good = isinstance(choices, list) and all(map(is_text, choices))
    good = {text: is_text(value) for text, value in texts.items()} | {
        "choices": choices_good and 1 <= len(choices) <= len(LETTERS),
        "answer": choices_good and type(answer) is int and 0 <= answer < len(choices),
        "image": image is None or is_text(image),
        "subject": texts["subject"] in SUBJECTS,
        "grade": grade in GRADES,
    }
    if wrong := [field for field, is_good in good.items() if not is_good]:
        value = printable(repr(fields.get(wrong[0])), 100)
        raise Error(f'{place}: the field "{wrong[0]}" must not be {value}; fetch the file again')
    return Problem(name, choices=choices, answer=answer, image=image, grade=int(grade), **texts)


def prompt(problem: Problem, form: str) -> str:
    """What is asked, in the official words: one pass that makes two spaces one, and no "Question: " in QCM."""
    question, context = f"Question: {problem.question}\n", f"Context: {problem.hint.strip() or 'N/A'}\n"
    choices = " ".join(f"({letter}) {choice}" for letter, choice in zip(problem.letters, problem.choices, strict=True))
    parts = {"Q": question, "C": context, "M": f"Options: {choices}\n"}
    text = "".join(parts[part] for part in form.partition("-")[0]).replace("  ", " ").strip()
    return text.replace("Question: ", "") if text.startswith("Question: ") else text


def target(problem: Problem, form: str) -> str:
    """What is to be answered. Where lecture and solution are both empty, it begins with a space, as the official data
    does: the one pass makes two spaces of three."""
    parts = {"L": problem.lecture, "E": problem.solution, "A": f"The answer is {LETTERS[problem.answer]}."}
    text = " ".join(["Answer:", *(parts[part] for part in form.partition("-")[2])]).replace("  ", " ").strip()
    return text.replace("Answer: ", "")


def make_record(problem: Problem, form: str) -> dict:
    """The official training record, the image's mark behind the question."""
    image, mark = ({"image": problem.image_name}, "\n<image>") if problem.image else ({}, "")
    asked = {"from": "human", "value": prompt(problem, form) + mark}
    answered = {"from": "gpt", "value": target(problem, form)}
    return {"id": problem.id, **image, "conversations": [asked, answered]}


def question(problem: Problem, form: str) -> str:
    """What a model is asked in the test: with its image, the mark stands in front; CQM-A asks for the letter alone."""
    text = f"{prompt(problem, form)}\n{LETTER_ONLY}" if form == "CQM-A" else prompt(problem, form)
    return f"<image>\n{text}" if problem.image else text
