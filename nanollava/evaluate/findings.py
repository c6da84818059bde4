"""What the ablations found, beside what the paper found: tables, outcomes, figures, a picture.

An outcome is computed from the runs alone: a variant is "within the spread" of the base where the ranges of their seeds
overlap; otherwise it "agrees" with the paper where it moves the score to the same side, or "disagrees".
"""

from collections.abc import Iterator
from itertools import chain
from statistics import mean

from PIL import Image, ImageDraw

from nanollava.evaluate.tables import BENCH_COCO, SCIENCE_QA
from nanollava.evaluate.variants import VARIANTS
from nanollava.train.curves import write

# Visual Instruction Tuning, table 4: LLaVA-Bench (COCO), relative scores; a name that we give, the paper's beside it
GROUPS = {"conversation": "conversation", "detail": "detail", "reasoning": "complex", "together": "all"}
NAMES = ("all", "detail+reasoning", "mostly-conversation", "conversation", "none")
BENCH = dict(zip(NAMES, BENCH_COCO.values(), strict=True))
# table 8: ScienceQA, accuracy. LLaVA-1.5 says of the linear projector that it is worse, and gives no figure
SCIENCE = {
    "all": SCIENCE_QA["LLaVA"][-1],
    "last-layer": 89.96, "answer-first": 89.77, "no-stage1": 85.81, "half-size": 89.84, "linear": None,
}  # fmt: skip
Runs = dict[str, list[dict]]  # variant -> what ``ablations.measure`` found with each seed


def values(runs: Runs, name: str, measure: str) -> list[float]:
    """Percent, one for each seed."""
    return [100 * found[measure] for found in runs[name]]


def cell(found: list[float]) -> str:
    """Mean (lowest to highest)."""
    return f"{mean(found):.1f} ({min(found):.1f} to {max(found):.1f})"


def outcome(base: list[float], found: list[float], paper: float) -> str:
    """How a variant's seeds stand to the base's, where the paper's difference is ``paper`` points."""
    if min(found) <= max(base) and min(base) <= max(found):
        return "within the spread"
    return "agrees" if (mean(found) - mean(base)) * paper > 0 else "disagrees"


def compared(runs: Runs) -> Iterator[tuple[str, str, float, float | None, str]]:
    """Variant, measure, difference from the base in points, the paper's (None: lower, no figure), outcome."""
    for name in (name for name in (*BENCH, *SCIENCE) if name in runs and name != "all"):
        if name in BENCH:
            papers = dict(zip(GROUPS, (a - b for a, b in zip(BENCH[name], BENCH["all"], strict=True)), strict=True))
        else:
            papers = {"verdict": None if SCIENCE[name] is None else SCIENCE[name] - SCIENCE["all"]}
        for measure, paper in papers.items():
            base, found = values(runs, "all", measure), values(runs, name, measure)
            word = outcome(base, found, -1.0 if paper is None else paper)
            yield name, measure, mean(found) - mean(base), paper, word


# ---------------------------------------------------------------- words


def report(runs: Runs, guessing: dict, steps: int, per_kind: int) -> str:
    """Everything in Markdown."""
    seeds = len(runs["all"])
    few = " With fewer than three seeds the range says little." if seeds < 3 else ""
    about = (
        f"Percent, mean (lowest to highest) of {seeds} seed{'s' * (seeds > 1)}; {steps:,} steps of stage 2 "
        f"and as many pictures in each for all; {per_kind} questions of each kind about pictures never seen."
    )
    blind = {name: mean(values({"blind": [f["blind"] for f in runs["all"]]}, "blind", name)) for name in CLOSED}
    guess = {name: 100 * guessing[name] for name in CLOSED}
    parts = [about + few]
    if any(name in runs for name in list(BENCH)[1:]):
        parts += ["### Kinds of instruction data", BENCH_ABOUT, bench_table(runs, guess, blind)]
    if any(name in runs for name in list(SCIENCE)[1:]):
        parts += ["### Design choices", SCIENCE_ABOUT, science_table(runs, guess, blind)]
    if len(runs) > 1:
        parts += ["### Held against the paper", AGAINST_ABOUT, against_table(runs), *explanations(runs)]
    return "\n\n".join(parts)


CLOSED = ("conversation", "reasoning", "whole", "verdict")  # measures of questions with one right answer
BENCH_ABOUT = (
    "Whole answers: conversation is the mean of its seven kinds of question, reasoning of its two, detail the share of "
    "descriptions with every thing, its attributes and its place right and nothing invented, together the mean of the "
    "three. Beside each the paper's score on LLaVA-Bench (COCO), relative to GPT-4's, given by GPT-4."
)
SCIENCE_ABOUT = (
    "Verdicts are what an answer comes down to, wherever in it that stands, as ScienceQA counts the letter alone: the "
    "mean of nine kinds. Beside them the paper's accuracy on ScienceQA; of the linear projector v1.5 says only that it "
    "is worse."
)
AGAINST_ABOUT = (
    "Differences from the full recipe. Within the spread: the ranges of the seeds overlap. Agrees, disagrees: they do "
    "not, and the score moves to the paper's side, or to the other."
)


def bench_table(runs: Runs, guess: dict, blind: dict) -> str:
    """Kinds of data as rows; ours and the paper's scores side by side."""
    head = ["stage 2 learns from", *(word for ours, paper in GROUPS.items() for word in (ours, f"paper: {paper}"))]
    rows = []
    for name in (name for name in BENCH if name in runs):
        pairs = zip(GROUPS, BENCH[name], strict=True)
        rows.append([VARIANTS[name].title, *(w for m, p in pairs for w in (cell(values(runs, name, m)), f"{p:.1f}"))])
    for title, found in (("guessing", guess), ("all kinds, blind", blind)):
        rows.append([title, *(w for m in GROUPS for w in (f"{found[m]:.1f}" if m in found else "", ""))])
    return markdown(head, rows)


def science_table(runs: Runs, guess: dict, blind: dict) -> str:
    """Design choices as rows."""
    rows = []
    for name in (name for name in SCIENCE if name in runs):
        ours = [cell(values(runs, name, measure)) for measure in ("verdict", "whole", "detail")]
        paper = "lower" if SCIENCE[name] is None else f"{SCIENCE[name]:.2f}"
        rows.append([VARIANTS[name].title, *ours, paper])
    for title, found in (("guessing", guess), ("the miniature's recipe, blind", blind)):
        rows.append([title, f"{found['verdict']:.1f}", f"{found['whole']:.1f}", "", ""])
    return markdown(["variant", "verdicts", "whole answers", "descriptions", "paper: ScienceQA"], rows)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def against_table(runs: Runs) -> str:
    """A row for each comparison: the difference from the base here and in the paper, and what they come to."""
    rows = [
        [VARIANTS[name].title, measure, f"{gap:+.1f}", "lower" if paper is None else f"{paper:+.1f}", word]
        for name, measure, gap, paper, word in compared(runs)
    ]
    return markdown(["variant", "measure", "the miniature, points", "the paper", "outcome"], rows)


def explanations(runs: Runs) -> list[str]:
    """What may explain outcomes other than the paper's: a line for each reason, with all that it is about."""
    titles: dict[str, list[str]] = {}
    for name in dict.fromkeys(row[0] for row in compared(runs) if row[-1] != "agrees"):
        titles.setdefault(VARIANTS[name].differs, []).append(VARIANTS[name].title)
    lines = [f"* {'; '.join(names)}: {reason}." for reason, names in titles.items()]
    return ["Where the outcome is another than the paper's, this may explain it:", "\n".join(lines)] if lines else []


def numbers(runs: Runs, guessing: dict) -> dict:
    """All figures: of each run, summed up, compared."""
    measures = [*GROUPS, "things", "whole", "verdict"]
    summed = {}
    for name in runs:
        found = {measure: [value / 100 for value in values(runs, name, measure)] for measure in measures}
        summed[name] = {m: {"mean": mean(x), "lowest": min(x), "highest": max(x)} for m, x in found.items()}
    keys = ("variant", "measure", "points", "paper", "outcome")
    against = [dict(zip(keys, row, strict=True)) for row in compared(runs)]
    return {"summary": summed, "against the paper": against, "guessing": guessing, "runs": runs}


# ---------------------------------------------------------------- the picture

OURS, PAPER, PALE = "#1f5fb4", "#d9541e", "#dddddd"
LEFT, WIDTH, ROW, TOP = 330, 480, 34, 96  # pixels: where scores begin, their width, a row's height, the first row


def plot(runs: Runs) -> Image.Image:
    """A row for each variant: a dot for each seed, a bar at their mean, a diamond where the paper's score is."""
    panels = [(BENCH, "together", {n: row[-1] for n, row in BENCH.items()}), (SCIENCE, "verdict", SCIENCE)]
    panels = [(m, {n: papers[n] for n in names if n in runs}) for names, m, papers in panels]
    panels = [(measure, papers) for measure, papers in panels if len(papers) > 1]
    height = sum(TOP + ROW * len(papers) + 70 for _, papers in panels)
    image = Image.new("RGB", (LEFT + WIDTH + 60, max(height, 100)), "white")
    pen, y = ImageDraw.Draw(image), 0
    for measure, papers in panels:
        draw_panel(pen, y, measure, papers, {name: values(runs, name, measure) for name in papers})
        y += TOP + ROW * len(papers) + 70
    return image


def draw_panel(pen: ImageDraw.ImageDraw, top: int, measure: str, papers: dict, ours: dict[str, list[float]]) -> None:
    """One measure, from a round number below the lowest score to 100."""
    known = [score for score in (*papers.values(), *chain(*ours.values())) if score is not None]
    low = 10 * (min(known) // 10)
    place = lambda score: LEFT + WIDTH * (score - low) / (100 - low)  # noqa: E731
    first, bottom = top + TOP, top + TOP + ROW * len(papers)
    title = {"together": "Kinds of instruction data: conversation, detail and reasoning together, percent"}
    write(pen, (20, top + 28), title.get(measure, "Design choices: verdicts, percent"), "lm", 20)
    pen.ellipse(dot(LEFT, top + 62, 5), fill=OURS)
    write(pen, (LEFT + 14, top + 62), "a seed of ours", "lm")
    pen.polygon(diamond(LEFT + 180, top + 62), outline=PAPER, width=2)
    write(pen, (LEFT + 194, top + 62), "the paper's score, on its own test", "lm")
    for tick in range(int(low), 101, 10 if 100 - low <= 60 else 20):
        pen.line([(place(tick), first), (place(tick), bottom)], fill=PALE)
        write(pen, (place(tick), bottom + 10), f"{tick}", "ma")
    for row, (name, found) in enumerate(ours.items()):
        y = first + ROW * row + ROW / 2
        write(pen, (20, y), VARIANTS[name].title, "lm", 14)
        pen.line([(place(mean(found)), y - 11), (place(mean(found)), y + 11)], fill=OURS, width=3)
        for score in found:
            pen.ellipse(dot(place(score), y, 5), outline=OURS, fill=OURS)
        if papers[name] is not None:
            pen.polygon(diamond(place(papers[name]), y), outline=PAPER, width=2)


def dot(x: float, y: float, radius: float) -> list[float]:
    return [x - radius, y - radius, x + radius, y + radius]


def diamond(x: float, y: float, radius: float = 8) -> list[tuple[float, float]]:
    return [(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)]
