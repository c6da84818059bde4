"""python -m nanollava.evaluate ablations --miniature runs/miniature --out runs/ablations

The paper's findings in miniature: does what matters there matter here? Each variant (variants.py) changes one thing of
a finished miniature, whose world, CLIP and Vicuna all of them share, and is trained by train.py's commands with several
seeds, which draw the projector's start and the order of the records. Each is asked the same questions about pictures
never seen. Stage 2 has the same number of steps, and of pictures in a step, whatever it learns from: where records are
left out there are fewer answers in a step, as the paper's ablations have less data too.

What is finished is not done again: after a kill the same command goes on.
"""

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch

import nanollava
from nanollava.checkpoint import load
from nanollava.error import Error
from nanollava.evaluate import findings
from nanollava.evaluate.miniature import Item, accuracy, answers, describe_scores, guesses, make_items, own
from nanollava.evaluate.variants import TURNED, VARIANTS, Variant, chosen, first_verdict, last_verdict, turned_item
from nanollava.files import write_whole
from nanollava.folder import check_writable, read_json
from nanollava.llama import LlamaConfig
from nanollava.llava import Llava
from nanollava.miniature import recipe
from nanollava.miniature.language import KINDS, PERCEPTION, REASONING
from nanollava.miniature.pretrain import language_config, pretrain_language
from nanollava.tokenizer import Tokenizer, load_tokenizer
from nanollava.train.keep import alone
from nanollava.train.machine import in_processes
from nanollava.train.resume import progress

PARTS = ("recipe.json", "tokenizer", "clip", "vicuna", "world/done")  # of a miniature: what all variants share
SETTING = "setting.json"  # in --out
NUMBERS = ("language_steps", "stage1_steps", "per_kind")  # of its recipe
Figures = dict[str, float | dict[str, float]]


@dataclass(frozen=True)
class Plan:
    """What is to be done, and where."""

    miniature: Path
    out: Path
    steps: int  # of stage 2
    language_steps: int
    stage1_steps: int
    per_kind: int  # questions

    @property
    def world(self) -> Path:
        return self.miniature / "world"

    def folder(self, name: str, seed: int) -> Path:
        return self.out / f"seed-{seed}" / name

    def result(self, variant: Variant, seed: int) -> Path:
        return self.out / f"seed-{seed}" / f"{variant.name}.json"


def main(argv: list[str] | None = None) -> int:
    """Run the variants; returns the exit status. Raises Error."""
    args = arguments(argv)
    names, plan = check(args), make_plan(args)
    with alone(args.out):
        settle(plan)
        run(plan, [VARIANTS[name] for name in names], args.seeds, args.at_once)
    return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nanollava.evaluate ablations", description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    option = parser.add_argument
    option("--miniature", type=Path, required=True, help="what python train.py miniature has left")
    option("--out", type=Path, required=True, help="folder for all that is trained, the tables and the picture")
    option("--seeds", type=int, default=3, help="runs of each variant (3)")
    option("--steps", type=int, default=900, help="of stage 2 (900; the demo's is 3600)")
    option("--only", metavar="A,B", help=f"some of {','.join(VARIANTS)}; all, the base, is always among them")
    option("--at-once", type=int, default=min(4, torch.get_num_threads()), help="runs side by side (a core each)")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> list[str]:
    """The variants' names. Raises Error for numbers and names that make no sense."""
    for name in ("seeds", "steps", "at_once"):
        if getattr(args, name) < 1:
            raise Error(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be above 0")
    names = {name.strip() for name in args.only.split(",")} if args.only else set(VARIANTS)
    if unknown := sorted(names - set(VARIANTS)):
        raise Error(f"--only {unknown[0]}: no such variant; choose from {', '.join(VARIANTS)}")
    return [name for name in VARIANTS if name in names | {"all"}]


def make_plan(args: argparse.Namespace) -> Plan:
    """Raises Error for a folder that is no miniature, or not one whose parts are all there."""
    folder = args.miniature
    if missing := [part for part in PARTS if not (folder / part).exists()]:
        problem = f"is no finished miniature, it has no {missing[0]}"
        raise Error(f"{folder}: {problem}; make one with  python train.py miniature --out {folder}")
    made = read_json(folder / "recipe.json")
    for name in NUMBERS:
        if type(made.get(name)) is not int or made[name] < 1:
            raise Error(f"{folder / 'recipe.json'}: the field {name!r} is {made.get(name)!r}, not a number above 0")
    return Plan(folder, args.out, args.steps, **{name: made[name] for name in NUMBERS})


def settle(plan: Plan) -> None:
    """Raises Error where --out holds runs of another setting, or something else: they would be taken for these."""
    check_writable(plan.out)
    file = plan.out / SETTING
    setting = {"steps": plan.steps, "miniature": read_json(plan.miniature / "recipe.json")}
    if file.exists() and read_json(file) != setting:
        problem = "holds runs with another number of steps, or of another miniature (setting.json there)"
        raise Error(f"{plan.out} {problem}; choose another --out, or delete it")
    if not file.exists() and plan.out.exists() and any(plan.out.iterdir()):
        raise Error(f"{plan.out}: holds other files; choose another --out")
    write(file, setting)


def write(file: Path, content: object) -> None:
    """A JSON file that is whole, or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(content, indent=2) + "\n")


# ---------------------------------------------------------------- the runs


def run(plan: Plan, variants: list[Variant], seeds: int, at_once: int) -> None:
    """Seed after seed, so that a run that was cut has whole ones; after each the tables of what is there."""
    train_command()  # now, not after minutes
    prepare(plan, variants)
    clock = recipe.Clock(plan.out / "times.json")
    for seed in range(seeds):
        missing = [variant for variant in variants if not plan.result(variant, seed).exists()]
        starts = {v.start: v for v in missing if v.stage1 and progress(plan.folder(v.start, seed)) != "finished"}
        if starts:
            with clock.step(f"seed {seed}, stage 1", f"Seed {seed}: stage 1, once for each way of starting"):
                side_by_side({name: (align, (plan, v, seed)) for name, v in starts.items()}, at_once)
        if missing:
            with clock.step(f"seed {seed}, stage 2", f"Seed {seed}: stage 2 and questions, {len(missing)} variants"):
                side_by_side({v.name: (tune, (plan, v, seed)) for v in missing}, at_once)
        if missing or seed + 1 == seeds:
            tell(plan, variants, seed + 1)
    print(f"\n{clock.summary()}", flush=True)


def tell(plan: Plan, variants: list[Variant], seeds: int) -> None:
    """Tables, figures and picture of that many seeds."""
    runs = {v.name: [read_json(plan.result(v, seed)) for seed in range(seeds)] for v in variants}
    guessing = read_json(plan.out / "guessing.json")
    text = findings.report(runs, guessing, plan.steps, plan.per_kind)
    print(f"\n{text}", flush=True)
    (plan.out / "results.md").write_text(text + "\n", encoding="utf-8")
    write(plan.out / "results.json", {"setting": read_json(plan.out / SETTING)} | findings.numbers(runs, guessing))
    findings.plot(runs).save(plan.out / "results.png")


def prepare(plan: Plan, variants: list[Variant]) -> None:
    """Files of records, each once; and what guessing gives."""
    names = {v.records for v in variants if v.records and not records_file(plan, v.records).exists()}
    guessed = (plan.out / "guessing.json").exists()
    records = own(records_file(plan, "all")) if names or not guessed else []
    for name in sorted(names):
        write(records_file(plan, name), chosen(records, name))
    if not guessed:
        closed = [item for item in make_items(plan.world, plan.per_kind) if item.question.kind in KINDS]
        exact, verdicts = (guesses(plan.world, closed, what) for what in (str, last_verdict))
        write(plan.out / "guessing.json", figures(accuracy(closed, exact), accuracy(closed, verdicts, last_verdict)))


def records_file(plan: Plan, name: str) -> Path:
    """The records of stage 2 that KEPT or TURNED calls so."""
    return plan.world / "instruct.json" if name == "all" else plan.out / "records" / f"{name}.json"


def side_by_side(jobs: dict[str, tuple[Callable, tuple]], at_once: int) -> None:
    """Independent jobs, ``at_once`` of them at the same time."""
    if at_once == 1:
        for function, arguments in jobs.values():
            function(*arguments)
        return
    names = list(jobs)
    for first in range(0, len(names), at_once):
        in_processes({name: jobs[name] for name in names[first : first + at_once]})


def train_command() -> recipe.Command:
    """What does a train.py command as typed. train.py stands beside the package, which else knows nothing of it."""
    file = Path(nanollava.__file__).parents[1] / "train.py"
    if not file.is_file():
        raise Error(f"{file}: no such file; the ablations train by its commands: start them from the whole repository")
    spec = importlib.util.spec_from_file_location("train", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run


def align(plan: Plan, variant: Variant, seed: int) -> None:
    """Stage 1 of a variant, and of all that start like it."""
    words = [*new_model(plan, variant), "--data", plan.world / "captions.json", "--steps", plan.stage1_steps]
    recipe.run_stage(train_command(), plan.folder(variant.start, seed), [
        "stage1", *words, *recipe.STAGE1, *always(plan, seed),
    ])  # fmt: skip


def tune(plan: Plan, variant: Variant, seed: int) -> None:
    """Stage 2 of a variant, and what comes out."""
    folder = start = plan.folder(variant.start, seed)
    if variant.records:
        folder = plan.folder(variant.name, seed)
        begin = ["--model", start] if variant.stage1 else new_model(plan, variant)
        words = [*begin, "--data", records_file(plan, variant.records), "--steps", plan.steps]
        recipe.run_stage(train_command(), folder, [
            "stage2", *words, *recipe.STAGE2, "--parallel", min(4, torch.get_num_threads()), *always(plan, seed),
        ])  # fmt: skip
    write(plan.result(variant, seed), measure(load(folder), plan, variant))


def new_model(plan: Plan, variant: Variant) -> list:
    """The words for a projector that begins between the shared CLIP and a Vicuna."""
    language = half_size(plan) if variant.half else plan.miniature / "vicuna"
    parts = ["--vision", plan.miniature / "clip", "--language", language, "--projector", variant.projector]
    return [*parts, "--select-layer", variant.layer, *recipe.NEW_MODEL]


def always(plan: Plan, seed: int) -> list:
    return ["--images", plan.world / "images", "--save-every", 200, "--seed", seed]


def half_size(plan: Plan) -> Path:
    """A Vicuna of half the parameters, narrower and less deep as 7B is beside 13B, from the same text; made once."""
    folder, tokenizer = plan.out / "vicuna-half", load_tokenizer(plan.miniature / "tokenizer")
    if progress(folder) != "finished":
        pretrain_language(plan.world, folder, tokenizer, plan.language_steps, half_config(tokenizer))
    return folder


def half_config(tokenizer: Tokenizer) -> LlamaConfig:
    narrow = {"hidden_size": 96, "intermediate_size": 264, "num_hidden_layers": 3, "num_attention_heads": 3}
    return replace(language_config(tokenizer), **narrow, num_key_value_heads=None, head_dim=None)


# ---------------------------------------------------------------- what comes out


def measure(model: Llava, plan: Plan, variant: Variant) -> Figures:
    """Answers about pictures never seen, scored by the rule that fits their order; for the base also blind."""
    items, what = make_items(plan.world, plan.per_kind), last_verdict
    if variant.records == TURNED:
        items, what = [turned_item(item) for item in items], first_verdict

    def score(some: list[Item], texts: list[str]) -> Figures:
        return figures(accuracy(some, texts), accuracy(some, texts, what))

    closed, detail = ([i for i in items if (i.question.kind in KINDS) == is_closed] for is_closed in (True, False))
    told = {show: ask(model, plan, closed, show) for show in ("image", "other")[: 1 + (variant.name == "all")]}
    found = score(closed, told["image"]) | describe_scores(detail, ask(model, plan, detail, "image"))
    found["detail"] = found.pop("things and places")
    found["together"] = mean(found[kind] for kind in ("conversation", "detail", "reasoning"))
    return found | ({"blind": score(closed, told["other"])} if "other" in told else {})


def ask(model: Llava, plan: Plan, items: Iterable[Item], show: str) -> list[str]:
    """Answers to the questions of items, about their "image" or "other" image."""
    return answers(model, plan.world, ((i.question.text, getattr(i, show)) for i in items), "vicuna_v1")


def figures(exact: dict[str, float], verdicts: dict[str, float]) -> Figures:
    """Whole answers as the paper groups its questions, the mean of all kinds, that of verdicts; and all kinds."""
    groups = {"conversation": PERCEPTION, "reasoning": REASONING}
    means = {name: mean(exact[kind] for kind in kinds) for name, kinds in groups.items()}
    return means | {"whole": exact["mean"], "verdict": verdicts["mean"], "exact": exact, "verdicts": verdicts}
