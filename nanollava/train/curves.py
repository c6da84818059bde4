"""python -m nanollava.train.curves --miniature runs/miniature --runs runs/curves

Does the memory-light optimizer (light.py) learn as AdamW in float32 does? Stage 2 of the miniature, from the stage 1
that `python train.py miniature` left, with both and three seeds, which shuffle the records: validation losses as a
table and a picture. Two runs at a time, one core each.
"""

import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

try:
    from nanollava.checkpoint import load
    from nanollava.config import LARGEST
    from nanollava.error import Error, say, some
    from nanollava.folder import check_writable
    from nanollava.train.data import Dataset
    from nanollava.train.loop import Options, train
    from nanollava.train.machine import in_processes
    from nanollava.train.records import group_by_image, read_records
    from nanollava.train.resume import progress
    from nanollava.train.stages import STAGES, precision
except KeyboardInterrupt:  # to import PyTorch takes seconds
    sys.exit(130)

COLOURS = {"adamw": "#1f5fb4", "light": "#d9541e"}
NAMES = {"adamw": "AdamW, float32: 16 bytes a parameter", "light": "light, bfloat16: 6 bytes a parameter"}
SEEDS = (0, 1, 2)
PARTS = (
    "stage1/config.json",
    "stage1/tokenizer.model",
    "world/instruct.json",
    "world/instruct_val.json",
    "world/images",
)
Curve = list[tuple[int, float]]  # step, validation loss


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--miniature", type=Path, required=True, help="folder with world/ and stage1/")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the six runs; finished ones are kept")
    parser.add_argument("--picture", type=Path, help="default: optimizers.png in the folder of the runs")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args(argv)
    args.picture = args.picture or args.runs / "optimizers.png"
    try:
        check(args)
        compare(args)
    except KeyboardInterrupt:
        print("\ninterrupted: go on with the same command", file=sys.stderr)
        return 130
    except Exception as error:
        return say(error)
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises Error for what would end the runs, or be found only behind them."""
    if not 0 < args.steps <= LARGEST:
        raise Error(f"--steps is {args.steps}: it must be above 0 and at most {LARGEST:,}")
    if not 0 < args.lr < 1000:
        raise Error(f"--lr is {args.lr}: it must be above 0 and below 1000")
    if missing := [part for part in PARTS if not (args.miniature / part).exists()]:
        remedy = "make it whole with python train.py miniature --out"
        raise Error(f"--miniature {args.miniature}: has no {missing[0]}; {remedy} {args.miniature}")
    check_writable(args.runs / "adamw-0")
    check_picture(args.picture)


def check_picture(file: Path) -> None:
    """Raises Error where no such picture can be written."""
    Image.init()
    if Image.registered_extensions().get(file.suffix.lower()) not in Image.SAVE:
        raise Error(f"--picture {file}: no kind of picture that is known here; let its name end in .png")
    try:
        tempfile.TemporaryFile(dir=file.resolve().parent).close()
        if file.exists():
            file.open("a").close()
    except OSError as error:
        raise Error(f"--picture {file}: cannot be written ({error.strerror}); choose another place") from error


def compare(args: argparse.Namespace) -> None:
    """The six runs, their table, their picture."""
    outs = {(name, seed): args.runs / f"{name}-{seed}" for name in COLOURS for seed in SEEDS}
    done = {run: read_curve(out, args.steps) for run, out in outs.items() if progress(out) == "finished"}
    for seed in SEEDS:
        jobs = {
            f"{name}, seed {seed}": (stage2, (args.miniature, outs[name, seed], name, seed, args.steps, args.lr))
            for name in COLOURS
            if (name, seed) not in done
        }
        if jobs:
            in_processes(jobs)
    curves = {run: read_curve(out, args.steps) for run, out in outs.items()}
    print(table(curves))
    plot(curves).save(args.picture)


def stage2(miniature: Path, out: Path, optimizer: str, seed: int, steps: int, lr: float, batch_size: int = 8) -> None:
    """One run, as `train.py stage2 --share-images --batch-size 8 --optimizer OPTIMIZER --seed SEED` does it."""
    stage, world = STAGES["stage2"], miniature / "world"
    model = load(miniature / "stage1", dtype=precision("language", stage, optimizer, "cpu", lora=False))
    groups = {}
    for name in ("instruct", "instruct_val"):
        file = world / f"{name}.json"
        examples, report = read_records(file, world / "images", model.tokenizer, model.config, "vicuna_v1")
        if report.findings:
            lost = some([finding.record for finding in report.findings], 3)
            raise Error(f"{file}: records that are bad, or lose something: {lost}; make the miniature again")
        groups[name] = group_by_image(examples)
    data = Dataset(groups["instruct"], world / "images", model.config)
    val = Dataset(groups["instruct_val"][:160], world / "images", model.config)
    every = dict.fromkeys(("val_every", "log_every", "save_every"), between(steps))
    options = Options(lr, None, batch_size, steps, optimizer=optimizer, seed=seed, **every)
    train(model, stage, data, val, out, options, resume=progress(out) == "begun")


def between(steps: int) -> int:
    """Steps between two validation losses of a run, and between two saves."""
    return max(1, steps // 20)


def read_curve(out: Path, steps: int) -> Curve:
    """Raises Error where a finished run has not the validation losses of so many steps."""
    file = out / "metrics.jsonl"
    try:
        entries = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        curve = [(entry["step"], entry["val_loss"]) for entry in entries if "val_loss" in entry]
        expected = [step for step in range(1, steps + 1) if step % between(steps) == 0 or step == steps]
        whole = [step for step, _ in curve] == expected and all(0 < loss < math.inf for _, loss in curve)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        whole = False
    if not whole:
        problem = f"has not the validation losses of a run of {steps} steps"
        raise Error(f"{file}: {problem}; delete {out}, and it is made anew, or give the --steps that it was made with")
    return curve


def table(curves: dict[tuple[str, int], Curve]) -> str:
    """Validation losses in Markdown: a quarter, half, three quarters of the way, and at the end."""
    steps = [step for step, _ in curves["adamw", 0]]
    places = [round(len(steps) * quarter / 4) - 1 for quarter in (1, 2, 3, 4)]
    rows = [["optimizer", "seed", *(f"step {steps[i]}" for i in places)], ["---"] * 6]
    rows += [[name, str(seed), *(f"{curve[i][1]:.4f}" for i in places)] for (name, seed), curve in curves.items()]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", *(verdict(curves, i) for i in places)])


def verdict(curves: dict[tuple[str, int], Curve], i: int) -> str:
    """How far the means of both are apart, beside how far the seeds of one are."""
    losses = {name: [curves[name, seed][i][1] for seed in SEEDS] for name in COLOURS}
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    gap, spread = means["light"] - means["adamw"], max(losses["adamw"]) - min(losses["adamw"])
    word = "within" if abs(gap) <= spread else "outside"
    step = curves["adamw", 0][i][0]
    return f"step {step}: light's mean loss is AdamW's {gap:+.4f}, {word} the spread of AdamW's seeds, {spread:.4f}"


# ---------------------------------------------------------------- the picture


@dataclass(frozen=True)
class Axes:
    """Where a step and a loss are in the picture; losses on a logarithmic scale."""

    steps: int
    low: float
    high: float
    box: tuple[int, int, int, int] = (90, 70, 940, 560)  # left, top, right, bottom

    def place(self, step: float, loss: float) -> tuple[float, float]:
        left, top, right, bottom = self.box
        share = math.log(self.high / loss) / math.log(self.high / self.low)
        return left + (right - left) * step / self.steps, top + (bottom - top) * share


def plot(curves: dict[tuple[str, int], Curve]) -> Image.Image:
    """One line for each run."""
    losses = [loss for curve in curves.values() for _, loss in curve]
    axes = Axes(max(curve[-1][0] for curve in curves.values()), min(losses) / 1.1, max(losses) * 1.1)
    image = Image.new("RGB", (980, 640), "white")
    pen = ImageDraw.Draw(image)
    draw_axes(pen, axes)
    for (name, _), curve in curves.items():
        pen.line([axes.place(*point) for point in curve], fill=COLOURS[name], width=2, joint="curve")
    for row, name in enumerate(COLOURS):
        pen.line([(520, 100 + 26 * row), (560, 100 + 26 * row)], fill=COLOURS[name], width=3)
        write(pen, (572, 100 + 26 * row), NAMES[name], "lm")
    return image


def draw_axes(pen: ImageDraw.ImageDraw, axes: Axes) -> None:
    left, _, right, bottom = axes.box
    write(pen, (left, 28), "Stage 2 of the miniature, validation loss, three seeds each", "lm", 20)
    for loss in (value * 10**power for power in range(-4, 2) for value in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7)):
        if axes.low < loss < axes.high:
            y = axes.place(0, loss)[1]
            pen.line([(left, y), (right, y)], fill="#dddddd")
            write(pen, (left - 10, y), f"{loss:g}", "rm")
    for step in range(0, axes.steps + 1, max(1, axes.steps // 8)):
        x = axes.place(step, axes.low)[0]
        pen.line([(x, bottom), (x, bottom + 6)], fill="black")
        write(pen, (x, bottom + 12), f"{step}", "ma")
    pen.rectangle(axes.box, outline="black")
    write(pen, ((left + right) / 2, bottom + 40), "step", "ma")


def write(pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, anchor: str, size: int = 16) -> None:
    pen.text(place, text, fill="black", anchor=anchor, font=ImageFont.load_default(size))


if __name__ == "__main__":
    raise SystemExit(main())
