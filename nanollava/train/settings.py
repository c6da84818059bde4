"""What may be asked of a run: the options of a stage's command, numbers that make sense, options that go together.
``args`` has an attribute for each option."""

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from nanollava.config import LARGEST
from nanollava.error import Error
from nanollava.train import lora
from nanollava.train.distributed import processes
from nanollava.train.stages import Stage

ABOVE_0 = ("max_length", "lr", "projector_lr", "clip", "batch_size", "epochs", "steps", "log_every", "parallel", "keep")
NOT_NEGATIVE = ("weight_decay", "rows_at_once", "val_every", "save_every")
SHARES = ("val_fraction", "warmup", "lora_dropout")  # from 0 up to, not including, 1


def add_stage(parser: argparse.ArgumentParser, stage: Stage) -> None:
    """The options of a stage's command."""
    add = parser.add_argument
    if stage.name == "stage2":
        add("--model", type=Path, help="result of stage 1 (or any LLaVA folder) to go on from")
    add("--vision", type=Path, help="CLIP folder")
    add("--language", type=Path, help="Vicuna folder")
    add("--data", type=Path, help="records: a JSON array in the official format")
    add("--images", type=Path, help="folder that the records' image names start from")
    add("--out", type=Path, help="folder for the result")
    add("--val", type=Path, help="records for a validation loss")
    add("--val-fraction", type=float, default=0.0, help="or: this share of --data, kept out of training")
    add("--val-every", type=int, default=0, help="steps between validation losses (0: at the end)")
    add("--projector", choices=("linear", "mlp2x_gelu"), help="the paper's (the default), or v1.5's and llava-hf's")
    add("--whiten", action="store_true", help="start the projector on whitened features: for small models")
    add("--select-layer", type=int, metavar="N", help="the tower's hidden state that is read, -1 being the last (-2)")
    add("--image-aspect-ratio", choices=("crop", "pad"), help="how pictures become squares (crop)")
    add("--max-length", type=int, help="positions of a row after splicing (2048)")
    add_lora(parser)
    add_steps(parser, stage)


def add_steps(parser: argparse.ArgumentParser, stage: Stage) -> None:
    """How the weights move, and what is kept of it."""
    add = parser.add_argument
    add("--lr", type=float, help=f"learning rate ({stage.lr}; {lora.RATE} with --lora)")
    add("--projector-lr", type=float, help="learning rate of the projector, where it differs")
    add("--optimizer", choices=("adamw", "light", "muon"), default="adamw", help="light: in less memory")
    add("--weight-decay", type=float, default=0.0)
    add("--warmup", type=float, default=0.03, help="share of the steps in which the rate rises (0.03)")
    add("--clip", type=float, default=1.0, help="largest gradient norm (1.0)")
    add("--batch-size", type=int, default=stage.batch_size, help=f"records (or images) in a step ({stage.batch_size})")
    add("--epochs", type=float, default=stage.epochs, help=f"times through the data ({stage.epochs})")
    add("--steps", type=int, help="optimizer steps, in place of --epochs")
    add("--rows-at-once", type=int, default=0, help="rows in memory at once; fewer accumulate gradients (0: all)")
    add("--parallel", type=int, default=1, help="micro-batches computed side by side, for small models on a CPU")
    add("--share-images", action="store_true", help="records about one image share one copy of it; steps count images")
    add("--cache-features", type=Path, metavar="DIR", help="keep the frozen tower's patch features of each image here")
    add("--save-every", type=int, default=500, help="steps between checkpoints (0: only at the end)")
    add("--keep", type=int, default=1, help="the last so many checkpoints stay: OUT, and in OUT/checkpoints (1)")
    add("--log-every", type=int, default=10, help="steps between lines")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action="store_true", help="torch.compile the language model")
    add("--recompute", action="store_true", help="save memory: compute each block again in backward")
    add("--skip-bad", action="store_true", help="leave bad records out, write their list to OUT.bad.txt")
    add("--dry-run", action="store_true", help="tell memory and, with --data, hours after ten steps; save nothing")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")


def add_lora(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--lora", type=int, nargs="?", const=lora.RANK, metavar="RANK", help="train adapters of the decoder (rank 128)")
    add("--lora-alpha", type=float, help="adapters count alpha / rank (twice the rank)")
    add("--lora-dropout", type=float, help=f"share of an adapter's inputs left out at random ({lora.DROPOUT})")


def settle(args: Any, stage: Stage) -> None:
    """Fill in what depends on other options. Raises Error for settings that make no sense, before anything is read."""
    check_numbers(args)
    check_processes(args)
    settle_lora(args, stage)


def check_numbers(args: Any) -> None:
    """Raises Error for settings that make no sense, before anything is read."""
    rules = (
        (ABOVE_0, "above 0", lambda x: 0 < x < math.inf),
        (NOT_NEGATIVE, "0 or more", lambda x: 0 <= x < math.inf),
        (("seed",), "0 or more, and below 2^32", lambda x: 0 <= x < 2**32),
        (("lr", "projector_lr", "weight_decay"), "below 1000", lambda x: x < 1000),
        (("lora", "lora_alpha"), "above 0 and below a million", lambda x: 0 < x < 1e6),
        (SHARES, "at least 0 and below 1", lambda x: 0 <= x < 1),
        (("max_length", "steps", "epochs"), f"at most {LARGEST:,}", lambda x: x <= LARGEST),
    )
    for names, expected, good in rules:
        for name in names:
            value = getattr(args, name)
            if value is not None and not good(value):
                raise Error(f"--{name.replace('_', '-')} is {value}: it must be {expected}")
    for name in () if args.dry_run else ("data", "out"):
        if getattr(args, name) is None:
            raise Error(f"give --{name}; --dry-run alone does without")
    if args.val and args.val_fraction:
        raise Error("--val and --val-fraction: give one of them, not both")
    if args.cache_features and args.out and args.cache_features.resolve().is_relative_to(args.out.resolve()):
        raise Error(f"--cache-features {args.cache_features}: in --out, which saving replaces; choose a folder outside")
    if args.optimizer == "light" and args.parallel > 1:
        raise Error("--optimizer light and --parallel: one updates inside backward, the other behind it; leave one out")


def check_processes(args: Any) -> None:
    """Raises Error for what one process alone can do."""
    if processes() > 1 and args.dry_run:
        raise Error("--dry-run works in one process: start without torchrun, or leave it out")


def settle_lora(args: Any, stage: Stage) -> None:
    """v1.5's settings where --lora is given without them. Raises Error for options that do not go with it."""
    args.base = (getattr(args, "model", None) or args.language or Path()).resolve().name if args.lora else ""
    if args.lora is None:
        if args.lora_alpha is not None or args.lora_dropout is not None:
            raise Error("--lora-alpha and --lora-dropout are settings of adapters: give --lora too, or leave them out")
        args.lr = args.lr or stage.lr
        return
    if "language" not in stage.trained:
        raise Error(f"--lora with {stage.name}: it trains the projector alone; adapters belong to stage2, leave it out")
    if args.optimizer != "adamw":
        raise Error(f"--lora with --optimizer {args.optimizer}: that is for whole matrices; leave one of them out")
    args.lr, args.projector_lr = args.lr or lora.RATE, args.projector_lr or lora.PROJECTOR_RATE
    args.lora_alpha = args.lora_alpha or 2 * args.lora
    args.lora_dropout = lora.DROPOUT if args.lora_dropout is None else args.lora_dropout
    if args.parallel > 1 and args.lora_dropout:
        raise Error("--lora with --parallel: dropout must be drawn in order; give --lora-dropout 0, or leave one out")
