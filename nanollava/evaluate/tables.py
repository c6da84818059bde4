"""The rows that the papers print, and tables in which ours stand beside them."""

from collections.abc import Iterable, Sequence

Row = tuple[float, ...]

BENCH_COLUMNS = ("conversation", "detailed description", "complex reasoning", "all")
BENCH_COCO: dict[str, Row] = {  # LLaVA table 4: LLaVA-13B by the instruction data that it was tuned on
    "all instruction data": (83.1, 75.3, 96.5, 85.1),
    "detail and reasoning": (81.5, 73.3, 90.8, 81.9),
    "conversation, 5% of detail, 10% of reasoning": (81.0, 68.4, 91.5, 80.5),
    "conversation alone": (76.5, 59.8, 84.9, 73.8),
    "no instruction tuning": (22.0, 24.0, 18.5, 21.5),
}
BENCH_WILD: dict[str, Row] = {  # LLaVA table 5
    "OpenFlamingo": (19.3, 19.0, 19.1, 19.1),
    "BLIP-2": (54.6, 29.1, 32.9, 38.1),
    "LLaVA": (57.3, 52.5, 81.7, 67.3),
    "LLaVA, judged three times": (58.8, 49.2, 81.4, 66.7),
}
SCIENCE_COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "avg")
SCIENCE_QA: dict[str, Row] = {  # LLaVA table 7
    "LLaVA": (90.36, 95.95, 88.00, 89.49, 88.00, 90.66, 90.93, 90.90, 90.92),
    "GPT-4": (84.06, 73.45, 87.36, 81.87, 70.75, 90.73, 84.69, 79.10, 82.69),
    "complement": (90.36, 95.50, 88.55, 89.05, 87.80, 91.08, 92.22, 88.73, 90.97),
    "judge": (91.56, 96.74, 91.09, 90.62, 88.99, 93.52, 92.73, 92.16, 92.53),
}


def published(rows: dict[str, Row], digits: int) -> dict[str, list[str]]:
    """The papers' rows as cells, named as theirs."""
    return {f"published: {name}": [f"{value:.{digits}f}" for value in row] for name, row in rows.items()}


def markdown(columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Rows (name, cells) under the columns, as a Markdown table."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows)])
