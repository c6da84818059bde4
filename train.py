"""python train.py miniature --out runs/miniature

The training commands:
    miniature   the whole paper, small, from nothing: world, CLIP, Vicuna, stage 1, stage 2, evaluation
    stage1      feature alignment pre-training: the projector, on captions
    stage2      visual instruction tuning: projector and language model, on conversations
"""

import argparse
import functools
import os
import sys
import time
from pathlib import Path

try:
    import torch

    from nanollava.checkpoint import load, load_language, load_vision
    from nanollava.error import Error, forgive_encoding, out_of_memory, say, some
    from nanollava.folder import last_good
    from nanollava.llava import Llava, LlavaConfig
    from nanollava.miniature.recipe import RECIPES, run_miniature
    from nanollava.projector import make_projector, whiten
    from nanollava.tokenizer import load_tokenizer
    from nanollava.train import distributed, settings
    from nanollava.train.advice import report
    from nanollava.train.budget import How, estimate, full_rows, outline
    from nanollava.train.data import Dataset
    from nanollava.train.features import FeatureCache
    from nanollava.train.keep import alone
    from nanollava.train.loop import Options, train
    from nanollava.train.machine import check_bfloat16, memory_in_use
    from nanollava.train.probe import largest, probe
    from nanollava.train.records import LOSSES, LOST, Example, Report, group_by_image, hold_out, read_records
    from nanollava.train.resume import check_out, progress
    from nanollava.train.stages import STAGES, Stage, precision
    from nanollava.weights import check_device, own
except KeyboardInterrupt:  # to import PyTorch takes seconds
    sys.exit(130)


def main(argv: list[str] | None = None) -> int:
    try:
        distributed.hush()
        args = make_parser().parse_args(argv)
    except Error as error:
        return say(error)
    except SystemExit:
        distributed.may_tell()  # or torchrun ends the first process before it has told
        raise
    forgive_encoding()
    try:
        args.run(args)
    except (KeyboardInterrupt, BrokenPipeError) as error:
        distributed.hush()
        print(f"\ninterrupted: go on with {again(args)}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 130
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at exit
        return 1
    except Exception as error:
        if lost := distributed.lost_partner(error):
            error = Error(f"another process of this run ended, or cannot be reached; go on with {again(args)}")
        if out_of_memory(error) and args.command != "miniature" and not args.dry_run:
            tells = "the same command with --dry-run tells what the run takes, and what would save how much"
            error = Error(f"out of memory outside of a step: {tells}")
        return say(error) if distributed.may_tell(lost) else 2
    return 0


def again(args: argparse.Namespace) -> str:
    """What goes on with a run that was broken off."""
    saved = args.command != "miniature" and not args.dry_run and progress(args.out) == "begun"
    return "the same command and --resume" if saved else "the same command"


def run(argv: list[str]) -> None:
    """A command as typed; raises whatever goes wrong."""
    args = make_parser().parse_args(argv)
    args.run(args)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command", metavar="miniature|stage1|stage2")
    for stage in STAGES.values():
        command = commands.add_parser(stage.name, help=f"trains: {', '.join(stage.trained)}")
        settings.add_stage(command, stage)
        command.set_defaults(run=functools.partial(run_stage, stage=stage))
    mini = commands.add_parser("miniature", help="the whole paper, small, from nothing")
    mini.add_argument("--out", type=Path, default=Path("runs/miniature"), help="folder for everything made")
    mini.add_argument("--recipe", choices=list(RECIPES), default="demo", help="how much of everything")
    mini.add_argument("--bundle", type=Path, help="folder for the weights in half precision, to give away")
    mini.set_defaults(run=make_miniature)
    return parser


def make_miniature(args: argparse.Namespace) -> None:
    if distributed.processes() > 1:
        raise Error("miniature trains in one process: start it without torchrun")
    run_miniature(args.out, RECIPES[args.recipe], run, args.bundle)


def run_stage(args: argparse.Namespace, stage: Stage) -> None:
    """One stage from files to a folder."""
    settings.settle(args, stage)
    device = distributed.join(args.device)
    check_device(device)
    check_bfloat16(device)
    if not args.dry_run:
        with alone(args.out):
            check_out(args.out, args.resume)
    torch.manual_seed(args.seed)
    args.device = device
    place = device if distributed.processes() == 1 else "cpu"  # shares are cut from what is there in full
    model = build_model(args, stage, "meta" if args.dry_run else place)
    if not args.dry_run:
        model.vision.to(device)  # which is never cut
    if args.dry_run and not args.data:
        work = full_rows(model.config, args.rows_at_once or args.batch_size, args.batch_size)
        return print(report(model.config, stage, How.of(args, args.device), work))
    if model.tokenizer is None:
        raise Error(f"{args.model}: no tokenizer.model in it; training needs one")
    groups, val = read_data(args, model, stage)
    if args.batch_size > len(groups):
        print(f"--batch-size {args.batch_size}: there are {len(groups)} to draw, so a step takes all of them")
        args.batch_size = len(groups)
    steps = args.steps or max(1, round(args.epochs * len(groups) / args.batch_size))
    if args.parallel > 1 and distributed.processes() > 1:
        print(f"--parallel {args.parallel}: left out, the processes of torchrun compute side by side")
    options = Options(steps=steps, **{name: getattr(args, name) for name in Options.__annotations__ if name != "steps"})
    features = FeatureCache(args.cache_features, model) if args.cache_features and not args.dry_run else None
    datasets = [Dataset(g, args.images, model.config, features) if g else None for g in (groups, val)]
    if args.dry_run:
        return probe_run(args, stage, datasets[0], options)
    if args.whiten and not args.resume:
        whiten(model.projector, patch_features(model, datasets[0]))
    distributed.let_tell()
    train(model, stage, *datasets, args.out, options, args.resume, device)
    distributed.leave()
    print(f"{stage.name} is done: talk to it with  python chat.py {args.out}")


def probe_run(args: argparse.Namespace, stage: Stage, data: Dataset, options: Options) -> None:
    """--dry-run with data: the budget of its rows before anything is loaded, then ten steps."""
    how, device = How.of(args, args.device), torch.device(args.device)
    work = largest(data, options, how.parallel)
    print(report(data.config, stage, how, work), flush=True)
    expected, before = estimate(outline(data.config, stage, how), how, work).peak, memory_in_use(device)
    print(probe(build_model(args, stage, args.device), stage, data, options, before, expected))


def build_model(args: argparse.Namespace, stage: Stage, device: str) -> Llava:
    """The model to start from: a LLaVA folder, or a new projector between a CLIP and a Vicuna."""
    dtypes = {
        part: precision(part, stage, args.optimizer, args.device, bool(args.lora)) for part in ("vision", "language")
    }
    if start := getattr(args, "model", None):
        if args.projector or args.language or args.whiten or args.select_layer is not None:
            new = "--projector, --language, --whiten and --select-layer belong to a new model"
            raise Error(f"{new}: --model has its own; leave them out")
        model = load(start, device, dtypes["language"], vision=args.vision)
        model.config.max_length = args.max_length or model.config.max_length
        model.config.image_aspect_ratio = args.image_aspect_ratio or model.config.image_aspect_ratio
        return own(model)
    if not args.vision or not args.language:
        raise Error("give --vision and --language folders" + (", or --model" if hasattr(args, "model") else ""))
    vision = load_vision(args.vision, device, dtypes["vision"])
    language = load_language(args.language, device, dtypes["language"])
    config = LlavaConfig(
        vision.config,
        language.config,
        args.projector or "linear",
        select_layer=select_layer(args.select_layer, vision.config.num_hidden_layers),
        image_aspect_ratio=args.image_aspect_ratio or "crop",
        max_length=args.max_length or 2048,
    )
    with torch.device("meta"):  # the projector alone is new
        model = Llava(config, load_tokenizer(last_good(args.language)))
    projector = make_projector(config.projector_type, vision.config.hidden_size, language.config.hidden_size)
    model.vision, model.projector, model.language = vision, projector.to(device), language
    return own(model)


def select_layer(layer: int | None, layers: int) -> int:
    """Raises Error for a hidden state that a tower of so many blocks does not have."""
    if layer is not None and layer not in range(-layers - 1, layers + 1):
        raise Error(f"--select-layer {layer}: the tower has {layers} blocks; give {-layers - 1} to {layers}")
    return -2 if layer is None else layer


def read_data(args: argparse.Namespace, model: Llava, stage: Stage) -> tuple[list[list[Example]], list[list[Example]]]:
    """Groups to train on, and groups kept for the validation loss."""
    groups = read_groups(args.data, args, model, stage)
    val = read_groups(args.val, args, model, stage) if args.val else []
    if args.val_fraction:
        groups, val = hold_out(groups, args.val_fraction, args.seed)
    if not groups:
        blame = f"--val-fraction {args.val_fraction} of {args.data}" if val else args.data
        raise Error(f"{blame}: no record left to train on")
    if args.val and not val:
        raise Error(f"{args.val}: no record left to validate on")
    return groups, val


@torch.no_grad()
def patch_features(model: Llava, data: Dataset, images: int = 256) -> torch.Tensor:
    """(M N, C) patch features of M training images, ``images`` or fewer. Raises Error where there are none."""
    names = sorted({name for examples in data.groups for example in examples for name in example.images})
    pixels = [p for p in data.pool.map(data.load, names[:: -(-len(names) // images) or 1]) if p is not None]
    if not pixels:
        raise Error("--whiten: no image to learn the features' spread from; leave it out")
    batches = torch.stack(pixels).to(model.vision.pre_layrnorm.weight).split(64)  # its device and dtype
    return torch.cat([model.vision(batch, model.config.select_layer).flatten(0, 1) for batch in batches])


def read_groups(file: Path, args: argparse.Namespace, model: Llava, stage: Stage) -> list[list[Example]]:
    """Records as groups to shuffle. Raises Error, after listing them, where records are bad and not to be skipped."""
    started = time.perf_counter()
    examples, report = read_records(file, args.images, model.tokenizer, model.config, stage.template)
    seconds = time.perf_counter() - started
    read = f"{report.records:,} records read in {seconds:.0f} s, rows of {model.config.max_length:,} positions"
    print(f"{file}: {read}; {len(examples):,} to train on", flush=True)
    for kind, words in LOSSES.items():
        if names := report.named(kind):
            print(f"  {words}: {some(names, 3)}", flush=True)
    if report.problems:
        refuse_or_skip(file, args, report)
    if report.named(LOST) and not examples:
        raise Error(f"{file}: nothing to learn: every record ends before its first answer; give a larger --max-length")
    return group_by_image(examples) if args.share_images else [[example] for example in examples]


def refuse_or_skip(file: Path, args: argparse.Namespace, report: Report) -> None:
    for line in report.problems[:20]:
        print(f"  {line}", file=sys.stderr)
    if len(report.problems) > 20:
        print(f"  and {len(report.problems) - 20} more", file=sys.stderr)
    if not args.skip_bad:
        raise Error(f"{file}: {len(report.problems)} bad records; mend them, or leave them out with --skip-bad")
    if args.dry_run:
        return
    listing = args.out.with_name(args.out.name + (".val" if file == args.val else "") + ".bad.txt")
    try:
        if distributed.rank() == 0:
            listing.write_text("\n".join(report.problems) + "\n", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise Error(f"{listing}: the list of bad records cannot be written ({error.strerror})") from error
    print(f"left out {len(report.problems)} bad records, listed in {listing}")


if __name__ == "__main__":
    distributed.end(main())
