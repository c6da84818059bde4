"""ScienceQA: which choice a text makes, who of two is believed, and the share that is right, in the paper's columns."""

import re
from collections.abc import Callable, Mapping

from nanollava.evaluate.problems import LETTERS, Problem

Choices = dict[str, int | None]  # id of a problem -> number of the choice; None: no choice can be read

ANSWER = re.compile("The answer is ([A-Z]).")  # the last dot is any sign, as in the official script

COLUMNS: dict[str, Callable[[Problem], bool]] = {
    "NAT": lambda problem: problem.subject == "natural science",
    "SOC": lambda problem: problem.subject == "social science",
    "LAN": lambda problem: problem.subject == "language science",
    "TXT": lambda problem: bool(problem.hint),  # text and image contexts overlap
    "IMG": lambda problem: bool(problem.image),
    "NO": lambda problem: not problem.hint and not problem.image,
    "G1-6": lambda problem: problem.grade <= 6,
    "G7-12": lambda problem: problem.grade >= 7,
    "avg": lambda problem: True,
}


def extract_answer(text: str) -> str | None:
    """The letter that a text chooses, by the official rules; None where they find none.

    The text is exactly A, B, C, D or E; else it begins with one of these, a dot and a space; else "The answer is X"
    with any capital X and one more sign, which is not the line's end, is there exactly once.
    """
    if len(text) == 1 and text in LETTERS:
        return text
    if text[:1] in set(LETTERS) and text[1:3] == ". ":
        return text[0]
    found = ANSWER.findall(text)
    return found[0] if len(found) == 1 else None


def choose(problems: Mapping[str, Problem], texts: Mapping[str, str]) -> Choices:
    """The choice of each problem by the text for it; None where there is no text, no letter, or none of the choices."""
    letters = {i: extract_answer(texts[i]) if i in texts else None for i in problems}
    return {i: problems[i].letters.index(x) if x and x in problems[i].letters else None for i, x in letters.items()}


def accuracy(problems: Mapping[str, Problem], choices: Choices) -> dict[str, float | None]:
    """Percent right by subject, context modality and grade, and of all (LLaVA table 7); None for a column without
    problems. What is not answered is wrong (the first release's script drew a choice at random)."""
    shares = {}
    for name, belongs in COLUMNS.items():
        right = [choices[i] == problem.answer for i, problem in problems.items() if belongs(problem)]
        shares[name] = 100 * sum(right) / len(right) if right else None
    return shares


def complement(ours: Choices, theirs: Choices) -> Choices:
    """GPT-4 with LLaVA behind it: ours where they chose nothing (LLaVA section 5.2)."""
    return {i: ours[i] if theirs[i] is None else theirs[i] for i in ours}


def differing(ours: Choices, theirs: Choices) -> list[str]:
    """The problems that GPT-4 as the judge is asked about: those on which the two disagree."""
    return [i for i in ours if ours[i] != theirs[i]]


def arbitrate(ours: Choices, theirs: Choices, verdicts: Choices) -> Choices:
    """GPT-4 as the judge: what both say; the verdict where they differ; ours where there is none."""
    decided = {i: verdicts.get(i) for i in differing(ours, theirs)}
    return {i: ours[i] if decided.get(i) is None else decided[i] for i in ours}
