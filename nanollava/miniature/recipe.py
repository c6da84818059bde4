"""The whole paper, small: world, CLIP, Vicuna, stage 1, stage 2, evaluation, one after the other.

Every step leaves a folder; a step whose folder is there is not done again, so a run that was cut goes on where it was.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanollava.checkpoint import load
from nanollava.error import Error
from nanollava.evaluate.miniature import caption_f1, evaluate, table
from nanollava.folder import last_good
from nanollava.miniature import pretrain, world


@dataclass(frozen=True)
class Recipe:
    size: world.WorldSize
    clip_steps: int
    language_steps: int
    stage1_steps: int
    stage2_steps: int
    per_kind: int = 300  # test questions of each kind


RECIPES = {
    "demo": Recipe(world.WorldSize(), 1300, 1200, 200, 1800),
    "full": Recipe(world.WorldSize(train=48_000, text=48_000), 8000, 5000, 600, 12000),
    "smoke": Recipe(world.WorldSize(80, 12, 60, 40), 4, 4, 3, 4, per_kind=12),
}


def run_miniature(out: Path, recipe: Recipe, command: Callable[[list[str]], int]) -> None:
    """Run what is missing in ``out``. ``command`` runs the training commands as typed, so that what happens here is
    what anyone can type."""
    started = time.perf_counter()
    places = {name: out / name for name in ("world", "clip", "vicuna", "stage1", "stage2")}
    drawn, clip, vicuna, stage1, stage2 = places.values()
    if not (drawn / "instruct.json").exists():
        chapter(started, f"Drawing the world: {recipe.size.train:,} pictures with captions and boxes")
        world.build(drawn, recipe.size)
    if not (out / "tokenizer/tokenizer.model").exists():
        pretrain.train_tokenizer(drawn, out / "tokenizer")
    tokenizer = pretrain.load_tokenizer(out / "tokenizer")
    if not last_good(clip).exists():
        chapter(started, "A small CLIP: which caption belongs to which picture?")
        pretrain.pretrain_vision(drawn, clip, tokenizer, recipe.clip_steps)
    if not last_good(vicuna).exists():
        chapter(started, "A small Vicuna: talking about scenes told in words, without pictures")
        pretrain.pretrain_language(drawn, vicuna, tokenizer, clip, recipe.language_steps)
    shared = ["--images", drawn / "images", "--log-every", "50", "--max-length", "320"]
    run(started, "Stage 1, feature alignment: the projector learns to caption", stage1, command, [
        "stage1", "--vision", clip, "--language", vicuna, "--projector", "mlp2x_gelu", 
        "--data", drawn / "captions.json",
        "--batch-size", "64", "--steps", recipe.stage1_steps, *shared,
    ])  # fmt: skip
    run(started, "Stage 2, visual instruction tuning: projector and language model converse", stage2, command, [
        "stage2", "--model", stage1, "--data", drawn / "instruct.json", "--val", drawn / "instruct_val.json",
        "--share-images", "--batch-size", "6", "--steps", recipe.stage2_steps, "--optimizer", "muon", "--lr", "4e-3",
        *shared,
    ])  # fmt: skip
    chapter(started, "Evaluation: answers generated about scenes never seen")
    report(out, recipe, stage1, stage2, drawn)
    print(f"all of it took {clock(time.perf_counter() - started)}; talk to it with  python chat.py {stage2}")


def run(started: float, title: str, folder: Path, command: Callable[[list[str]], int], words: list) -> None:
    """One training command, unless its result is there; resumed where it was cut."""
    if last_good(folder).exists() and not (last_good(folder) / "training.pt").exists():
        return
    words = [str(word) for word in [*words, "--out", folder]] + ["--resume"] * last_good(folder).exists()
    chapter(started, title)
    print("python train.py " + " ".join(words), flush=True)
    if command(words):
        raise Error(f"{folder.name} failed; the line above says why")


def report(out: Path, recipe: Recipe, stage1: Path, stage2: Path, drawn: Path) -> None:
    """Print the table and leave it in results.json."""
    models = {"after stage 1": load(stage1), "after stage 2": load(stage2)}
    columns = evaluate(models, drawn, recipe.per_kind)
    own, others = caption_f1(models["after stage 1"], drawn)
    print(f"\nstage 1's captions: F1 of attributes {100 * own:.1f}, against another image {100 * others:.1f}\n")
    print(table(columns))
    detail = columns["detail"]
    print(f"\ndetailed descriptions that name every thing and invent none: {100 * detail['things']:.1f}%", end="")
    print(f", and put each in its place: {100 * detail['things and places']:.1f}%")
    results = {"questions_per_kind": recipe.per_kind, "columns": columns, "caption_f1": [own, others]}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def chapter(started: float, title: str) -> None:
    print(f"\n[{clock(time.perf_counter() - started)}] {title}", flush=True)


def clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
