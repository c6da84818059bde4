"""What may be asked of a run: numbers that make sense, and options that go together. ``args`` has an attribute for each
option of train.py."""

import math
from pathlib import Path
from typing import Any

from nanollava.config import LARGEST
from nanollava.error import Error
from nanollava.train import lora
from nanollava.train.distributed import processes
from nanollava.train.stages import Stage

ABOVE_0 = ("max_length", "lr", "projector_lr", "clip", "batch_size", "epochs", "steps", "log_every", "parallel", "keep")
NOT_NEGATIVE = ("weight_decay", "rows_at_once", "val_every", "save_every")
SHARES = ("val_fraction", "warmup", "lora_dropout")  # from 0 up to, not including, 1


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
