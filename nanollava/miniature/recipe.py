"""The whole paper, small: world, CLIP, Vicuna, stage 1, stage 2, evaluation, one after the other.

Every step leaves a folder; a step whose folder is there is not done again, so a run that was cut goes on where it was.
"""

import json
import os
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from nanollava.checkpoint import load, write
from nanollava.error import Error
from nanollava.evaluate.miniature import caption_f1, evaluate, summary
from nanollava.files import write_whole
from nanollava.folder import atomic_folder, check_replaceable, check_writable, read_json
from nanollava.miniature import language, pretrain, scenes, teacher, world
from nanollava.miniature.scenes import Scene, Thing, draw, random_scene
from nanollava.progress import minutes
from nanollava.tokenizer import load_tokenizer
from nanollava.train.machine import in_processes, processor
from nanollava.train.resume import progress

Command = Callable[[list[str]], None]  # does a train.py command as typed; raises what goes wrong


@dataclass(frozen=True)
class Recipe:
    """How much of everything."""

    size: world.WorldSize
    clip_steps: int
    language_steps: int
    stage1_steps: int
    stage2_steps: int
    per_kind: int = 300  # test questions of each kind


RECIPES = {  # demo: make demo; full: the bundled weights; smoke: the tests, a minute in which nothing is learnt
    "demo": Recipe(world.WorldSize(21_600), clip_steps=600, language_steps=1000, stage1_steps=250, stage2_steps=3600),
    "full": Recipe(world.WorldSize(43_200), clip_steps=1200, language_steps=2000, stage1_steps=250, stage2_steps=10000),
    "smoke": Recipe(world.WorldSize(80, 12, 60, 40), 4, 4, 3, 4, per_kind=12),
}
# Settings of the stages, the ablations' too. Muon in place of the paper's AdamW, and one copy of an image for all its
# questions: looking things up is learnt only after tens of thousands of questions
NEW_MODEL = ("--whiten", "--max-length", 256)
STAGE1 = ("--batch-size", 64, "--log-every", 50)
STAGE2 = ("--share-images", "--batch-size", 8, "--optimizer", "muon", "--lr", "2e-3", "--log-every", 50)
SAMPLE = Scene(
    (Thing(0, "large", "yellow", "star"), Thing(1, "small", "red", "heart"), Thing(3, "large", "blue", "circle"))
)
ASKED = (
    "How many objects are there?", "What colour is the heart?", "Is there a blue star?",
    "Is the star above or below the circle?", "What shape is the object to the right of the star?",
    "Describe the picture in detail.",
)  # fmt: skip


def run_miniature(out: Path, recipe: Recipe, command: Command, bundle: Path | None = None) -> None:
    """Do what is missing in ``out``; leave small weights to give away in ``bundle``. Stages run through ``command``, so
    that what happens here is what anyone can type."""
    drawn, clip, vicuna, stage1, stage2 = (out / name for name in ("world", "clip", "vicuna", "stage1", "stage2"))
    if bundle:  # now, not after an hour of training
        check_bundle(bundle, out)
    check_writable(drawn)
    keep_to(recipe, out)
    clock = Clock(out / "times.json")
    if not (drawn / "done").exists():
        with clock.step("world", f"Drawing the world: {recipe.size.train:,} pictures with captions and boxes"):
            world.build(drawn, recipe.size)
            pretrain.train_tokenizer(drawn, out / "tokenizer")
            (drawn / "done").touch()
    pretrain_parts(drawn, clip, vicuna, recipe, clock)
    images = ["--images", drawn / "images"]
    with clock.step("stage 1", "Stage 1, feature alignment: the projector learns to caption"):
        run_stage(command, stage1, [
            "stage1", "--vision", clip, "--language", vicuna, "--projector", "mlp2x_gelu", *NEW_MODEL,
            "--data", drawn / "captions.json", "--steps", recipe.stage1_steps, *STAGE1, *images,
        ])  # fmt: skip
    with clock.step("stage 2", "Stage 2, visual instruction tuning: projector and language model learn to converse"):
        run_stage(command, stage2, [
            "stage2", "--model", stage1, "--data", drawn / "instruct.json", "--val", drawn / "instruct_val.json",
            "--steps", recipe.stage2_steps, "--val-every", 500, *STAGE2,
            "--parallel", min(4, torch.get_num_threads()), *images,
        ])  # fmt: skip
    clock.seconds.pop("evaluation", None)  # it is always done anew
    with clock.step("evaluation", "Evaluation: answers generated about scenes never seen"):
        if bundle:
            give_away(stage2, bundle)
        text = report(out, recipe, stage1, bundle or stage2, drawn)
    talk = f"talk to it:  {python()} chat.py {bundle or stage2} --image {out / 'sample.png'}"
    print(f"{text}\n\n{clock.summary()}\n{talk}", flush=True)
    if bundle:
        facts = {"out": out, "bundle": bundle, "machine": processor(), "clock": clock.summary(), "text": text}
        (bundle / "README.md").write_text(bundle_readme(bundle, recipe, facts))


def bundle_readme(bundle: Path, recipe: Recipe, facts: dict) -> str:
    """The page beside the weights: how they were made, and what they can do."""
    name = next(name for name, known in RECIPES.items() if known == recipe)
    millions = sum(p.numel() for p in load(bundle).parameters()) / 1e6
    return BUNDLE_README.format(recipe=name, millions=millions, **facts)


def check_bundle(bundle: Path, out: Path) -> None:
    """Raises Error where the weights to give away cannot be written, or would replace a part of the run."""
    inner, outer = sorted((bundle.resolve(), out.resolve()), key=lambda folder: -len(folder.parts))
    if inner.is_relative_to(outer):
        raise Error(f"--bundle {bundle} and --out {out}: one lies in the other; choose folders apart")
    check_writable(bundle)
    check_replaceable(bundle)


def keep_to(recipe: Recipe, out: Path) -> None:
    """Raises Error where another recipe, or this one with other code, was begun in this folder: its finished steps
    would be taken for this one's."""
    parts = (scenes, language, teacher, world, pretrain)
    code = zlib.crc32(b"".join(Path(part.__file__).read_bytes() for part in parts))
    file, words = out / "recipe.json", json.dumps({**asdict(recipe), "code": f"{code:08x}"}, indent=2) + "\n"
    if file.exists() and file.read_bytes() == words.encode():
        return
    if file.exists() or (out / "world").exists():
        problem = "holds a run with other numbers or of another version (recipe.json there)"
        raise Error(f"{out} {problem}; choose another --out, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(file, words)


def python() -> str:
    """How to call the Python that runs this, from the current folder."""
    return os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else "python"


def pretrain_parts(drawn: Path, clip: Path, vicuna: Path, recipe: Recipe, clock: "Clock") -> None:
    """CLIP and Vicuna know nothing of each other, so they are made at the same time."""
    tokenizer, missing = load_tokenizer(drawn.with_name("tokenizer")), {}
    if progress(clip) != "finished":
        missing["CLIP"] = pretrain.pretrain_vision, (drawn, clip, tokenizer, recipe.clip_steps)
    if progress(vicuna) != "finished":
        missing["Vicuna"] = pretrain.pretrain_language, (drawn, vicuna, tokenizer, recipe.language_steps)
    if missing:
        title = "A small CLIP: which caption belongs to which picture? A small Vicuna: scenes told in words"
        with clock.step(" and ".join(missing), title):
            in_processes(missing)


class Clock:
    """Seconds spent in each step, kept over interruptions."""

    def __init__(self, file: Path):
        self.file = file
        self.seconds: dict[str, float] = read_json(file) if file.exists() else {}
        if not all(isinstance(seconds, int | float) for seconds in self.seconds.values()):
            raise Error(f"{file}: a step's seconds are no number; delete this file, the run goes on without it")

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        total, started = sum(self.seconds.values()), time.perf_counter()
        print(f"\n[{minutes(total)}] {title}", flush=True)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            write_whole(self.file, json.dumps(self.seconds))

    def summary(self) -> str:
        steps = ", ".join(f"{name} {minutes(seconds)}" for name, seconds in self.seconds.items())
        return f"Minutes: {steps}; together {minutes(sum(self.seconds.values()))}."


def run_stage(command: Command, folder: Path, words: list) -> None:
    """One training command, unless its result is there; resumed where it was cut."""
    done = progress(folder)
    if done == "finished":
        return
    words = [str(word) for word in [*words, "--out", folder]] + ["--resume"] * (done == "begun")
    print("python train.py " + " ".join(words), flush=True)
    command(words)


def report(out: Path, recipe: Recipe, stage1: Path, stage2: Path, drawn: Path) -> str:
    """The results as Markdown, with a conversation; as numbers in results.json."""
    models = {"after stage 1": load(stage1), "after stage 2": load(stage2)}
    scores = evaluate(models, drawn, recipe.per_kind)
    own, others = caption_f1(models["after stage 1"], drawn)
    results = {"questions_per_kind": recipe.per_kind, **scores, "caption_f1": [own, others]}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw_sample(out / "sample.png")
    asked = (f"> {question}\n{models['after stage 2'].answer(out / 'sample.png', question)}" for question in ASKED)
    return (
        f"{summary(scores, recipe.per_kind)}\n\n"
        f"After stage 1, captions name attributes with an F1 of {100 * own:.1f}; "
        f"held against another image, {100 * others:.1f}.\n\n"
        "Asked about sample.png, a scene that no phase of training has seen:\n\n```\n" + "\n".join(asked) + "\n```"
    )


BUNDLE_README = """\
# The miniature's weights

A LLaVA of {millions:.1f} million parameters, trained from nothing on pictures that the repository draws itself. Made by

    python train.py miniature --recipe {recipe} --out {out} --bundle {bundle}

on {machine}. {clock}

![sample.png](sample.png)

{text}
"""


def give_away(model: Path, folder: Path) -> None:
    """The weights in half precision, with a picture to talk about."""
    with atomic_folder(folder) as new:
        write(load(model), new, torch.float16)
        draw_sample(new / "sample.png")
        sheet(rows=2, columns=6, side=144).save(new / "world.png")


def draw_sample(file: Path) -> None:
    draw(SAMPLE, seed=3, side=192)[0].save(file)


def sheet(rows: int, columns: int, side: int) -> Image.Image:
    """Test scenes side by side: what the world looks like."""
    rng, gap = random.Random(0), 8
    image = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + gap) + gap), "white")
    for n in range(rows * columns):
        scene = random_scene(rng, "test", count=1 + n % 3)
        image.paste(draw(scene, n, side)[0], (gap + n % columns * (side + gap), gap + n // columns * (side + gap)))
    return image
