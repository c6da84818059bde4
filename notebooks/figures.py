"""What several notebooks draw, and how they show this library's source.

Importing it sets the style of all figures.
"""

import inspect
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython import get_ipython
from IPython.display import Markdown, display
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image
from sentencepiece import SentencePieceProcessor

import nanollava
from nanollava.images import MEAN, STD
from nanollava.tokenizer import Tokenizer

HERE = Path(__file__).parent
WEIGHTS = HERE.parent / "weights" / "miniature"
if not WEIGHTS.is_dir():
    raise FileNotFoundError(
        f"{WEIGHTS}: it comes with the repository, and `make weights` remakes it"
    )
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, GREY = "#CC79A7", "#56B4E9", "#999999"
if shell := get_ipython():
    shell.run_line_magic("matplotlib", "inline")  # also where MPLBACKEND says otherwise
plt.style.use(["default", HERE / "nanollava.mplstyle"])


def file_of(thing: object) -> str:
    """The file of a function or class, as it is named in the repository."""
    root = Path(
        nanollava.__file__
    ).parent.parent  # not this repository where the package is installed elsewhere
    return Path(inspect.getsourcefile(thing)).relative_to(root).as_posix()


def source(*objects: object) -> None:
    """Show functions, methods and classes as they stand in the library's files."""
    for thing in objects:
        thing = inspect.unwrap(thing)
        file = file_of(thing)
        code = inspect.cleandoc("\n" + inspect.getsource(thing))
        display(Markdown(f"[`{file}`](../{file})\n```python\n{code}\n```"))


def say(*parts: object, indent: str = "") -> None:
    """Print the parts as one text, broken between words after 96 characters at most."""
    whole = {"break_long_words": False, "break_on_hyphens": False}
    for line in " ".join(map(str, parts)).split("\n"):
        words = line.rstrip()
        broken = textwrap.fill(words, 96, subsequent_indent=indent or "  ", **whole)
        print(broken + line[len(words) :])  # spaces at its end can matter


def picture(pixels: torch.Tensor) -> np.ndarray:
    """(3, S, S) pixels of ``preprocess`` -> (S, S, 3) from 0 to 1, as matplotlib has it."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (pixels.float() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def show(
    images: Sequence, titles: Sequence[str] | None = None, columns: int = 5, size: float = 1.6
) -> None:
    """Pictures in rows: PIL images, (S, S, 3) arrays or (3, S, S) pixels of ``preprocess``."""
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    _, axes = plt.subplots(
        rows, columns, figsize=(size * columns, (size + 0.3) * rows), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, image) in enumerate(zip(axes.flat, images, strict=False)):
        axis.imshow(picture(image) if isinstance(image, torch.Tensor) else image)
        axis.set_title(titles[i] if titles else "")
    plt.show()


def matrix(
    values: torch.Tensor,
    x: str,
    y: str,
    ax: plt.Axes | None = None,
    title: str = "",
    bar: str = "",
) -> None:
    """A matrix as colours: what its columns and rows are; ``bar`` says what a colour means."""
    ax = ax or plt.gca()
    drawn = ax.imshow(torch.as_tensor(values).float().numpy())
    ax.set(xlabel=x, ylabel=y, title=title)
    if bar:
        plt.colorbar(drawn, ax=ax, label=bar, shrink=0.8)


def tokens(
    pieces: Sequence[str],
    colours: Sequence[str],
    legend: dict[str, str] | None = None,
    width: int = 78,
) -> None:
    """Tokens as boxes, in lines of ``width`` characters; a space is shown as a low line."""
    lines, used = [[]], 0
    for piece, colour in zip(pieces, colours, strict=True):
        shown = piece.replace("\n", "\\n").replace(" ", "▁")
        wide = max(len(shown), 1)
        if used + len(shown) + 1.2 > width and lines[-1]:
            lines, used = [*lines, []], 0
        lines[-1].append((used, wide, shown, colour))
        used += wide + 1.2
    _, ax = plt.subplots(figsize=(8, 0.34 * len(lines) + (0.35 if legend else 0.1)))
    middle = {"ha": "center", "va": "center", "family": "monospace", "size": 8.5}
    for row, line in enumerate(lines):
        for x, wide, shown, colour in line:
            box = FancyBboxPatch(
                (x, -row - 0.34), wide, 0.68, boxstyle="round,pad=0.08", fc=colour, lw=0
            )
            ax.add_patch(box).set_alpha(0.35)
            ax.text(x + wide / 2, -row, shown, **middle)
    for name, colour in (legend or {}).items():
        ax.scatter([], [], marker="s", s=80, color=colour, alpha=0.35, label=name)
    if legend:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(legend), borderaxespad=0)
    ax.set(xlim=(-0.5, width + 0.5), ylim=(-len(lines) + 0.4, 0.6))
    ax.axis("off")
    plt.show()


def overlay(
    image: Image.Image,
    weights: torch.Tensor,
    ax: plt.Axes | None = None,
    title: str = "",
    most: float = 0,
) -> None:
    """How much is looked at each patch, (n, n), over the picture: the less, the paler.

    most: what counts as all of it; 0 is the largest of these weights.
    """
    ax = ax or plt.gca()
    share = (weights / (most or weights.max())).clamp(0, 1).float().numpy()
    white = np.ones((*share.shape, 4))
    white[..., 3] = 0.85 * (1 - share)
    side = image.width
    ax.imshow(image, extent=(0, side, image.height, 0))
    ax.imshow(white, extent=(0, side, image.height, 0))
    ax.set_title(title)
    ax.axis("off")


BOXES = {  # of the architecture: middle, what it is, its files, its notebook
    "picture": (0, 0, "picture", "images.py", "1"),
    "tower": (1, 0, "vision tower g", "vit.py", "1 and 2"),
    "projector": (2, 0, "projector W", "projector.py", "4"),
    "question": (0, 1, "question", "conversation.py", "5"),
    "ids": (1, 1, "token ids", "tokenizer.py", "5"),
    "splice": (2, 1, "splice", "llava.py", "4"),
    "language": (3, 1, "language model f", "llama.py\nattention.py", "3, 8, 9"),
    "answer": (4, 1, "answer", "sampling.py\ngenerate.py", "3"),
}
ARROWS = (
    ("picture", "tower", "pixels\nX$_v$"), ("tower", "projector", "features\nZ$_v$"),
    ("projector", "splice", " image tokens H$_v$"), ("question", "ids", ""),
    ("ids", "splice", "words\nH$_q$"), ("splice", "language", ""),
    ("language", "answer", "logits"),
)  # fmt: skip


def architecture() -> None:
    """Figure 1 of the paper with the names of our files, and the notebook about each."""
    _, ax = plt.subplots(figsize=(8.8, 3))
    middle = {"ha": "center", "va": "center"}
    for x, y, name, files, notebook in BOXES.values():
        frame = FancyBboxPatch((x - 0.3, y - 0.3), 0.6, 0.6, boxstyle="round,pad=0.03")
        ax.add_patch(frame).set(fc="#E8F1F8", ec=BLUE)
        plural = "s" if len(notebook) > 1 else ""
        ax.text(x, y - 0.2, name, weight="bold", size=8, **middle)
        ax.text(x, y + 0.02, files, family="monospace", size=8, color=BLUE, **middle)
        ax.text(
            x, y + 0.23, f"notebook{plural} {notebook}", size=7.5, color="#555555", **middle
        )
    for start, end, name in ARROWS:
        (x0, y0), (x1, y1) = BOXES[start][:2], BOXES[end][:2]
        down = x0 == x1
        ends = (
            ((x0, y0 + 0.33), (x1, y1 - 0.33)) if down else ((x0 + 0.33, y0), (x1 - 0.33, y1))
        )
        arrow = FancyArrowPatch(
            *ends, arrowstyle="-|>", mutation_scale=11, shrinkA=0, shrinkB=0
        )
        ax.add_patch(arrow).set(color="black")
        where = {"ha": "left", "va": "center"} if down else {"ha": "center", "va": "bottom"}
        ax.text((x0 + x1) / 2, (y0 + y1) / 2 - (0 if down else 0.06), name, size=8, **where)
    ax.set(xlim=(-0.4, 4.4), ylim=(1.4, -0.4))
    ax.axis("off")
    plt.show()


# 03_language_model, 05_words_that_count
def pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Each token's own text, the space in front of it included; an image's is <image>."""
    model = SentencePieceProcessor(str(tokenizer.file))
    shown = [model.id_to_piece(i) if i >= 0 else "<image>" for i in ids]
    return [piece.replace("▁", " ").replace("<0x0A>", "\n") for piece in shown]
