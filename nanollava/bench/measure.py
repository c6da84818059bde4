"""All rows of one model: its folder, loading, tower, prefill, decoding, training."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import nanollava
from nanollava.bench import load, models, ours, reference, training
from nanollava.bench import operations as count
from nanollava.bench.limits import Limits
from nanollava.bench.machine import free_memory, lack
from nanollava.bench.rows import Row, alternate
from nanollava.llava import LlavaConfig


@dataclass(frozen=True)
class Effort:
    """How much is done of each kind of work."""

    pairs: int  # repetitions of each
    tokens: int  # decoded
    records: int  # of a training step
    at_once: int  # of them, in memory, for transformers
    rows: int  # in memory, for ours: of 2,048 positions, which hold about two records
    steps: int  # training steps of each
    warm: bool = True  # whether a first training step is not counted
    compiled: bool = False  # whether decoding is timed in its compiled forms too: a minute of compiling each


SMALL = {"miniature": Effort(9, 64, 32, 4, 2, 3), "135m": Effort(5, 48, 16, 2, 1, 2, False, True)}
FULL = SMALL | {"1.1b": Effort(2, 16, 4, 2, 1, 1, warm=False), "7b": Effort(1, 1, 1, 1, 1, 1)}
ON_GPU = SMALL | {"1.1b": Effort(5, 64, 32, 8, 4, 2), "7b": Effort(3, 64, 32, 8, 4, 2, compiled=True)}
QUICK = {"miniature": Effort(3, 32, 8, 4, 2, 2), "135m": Effort(2, 16, 2, 1, 1, 1, warm=False)}


@dataclass
class Bench:
    """Where and how all models are measured."""

    device: torch.device
    limits: Limits
    work: Path  # a folder for weights
    efforts: dict[str, Effort]
    tell: Callable[[str], None]
    folder: Path | None = None  # a 7B model that is there already
    asked: bool = False  # whether the models were named: then one that finds no room is an error

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """What inference is done in."""
        return torch.bfloat16 if self.on_cuda else torch.float32

    @property
    def theirs(self) -> bool:
        return reference.installed()

    def rows(self, name: str) -> Iterator[Row]:
        """The rows of a model as they are measured. What this machine cannot hold is a row that says so."""
        config, only_load = models.MODELS[name], name == "7b" and not self.on_cuda
        dtype = torch.bfloat16 if only_load else self.dtype
        if problem := self.problem(name, config, dtype, only_load):
            yield Row(name, "load" if only_load else "all", note=f"skipped: {problem}")
            return
        folder = self.weights(name, dtype)
        yield self.load(name, config, folder, dtype)
        if not only_load:
            yield from self.inference(name, config, folder)
            yield from training.rows(self, name, folder)

    def problem(self, name: str, config: LlavaConfig, dtype: torch.dtype, only_load: bool) -> str:
        """What is too small for a model; "" where nothing is."""
        size = models.stored_bytes(config, dtype)
        needed = size * (1.1 if only_load else 1.2 * (2 if self.theirs else 1))
        if needed > free_memory(self.device):
            return lack(needed, self.device)
        written = not (name == "7b" and self.folder) and not self.asked
        return models.lack_of_disk(self.work, size) if written else ""

    def weights(self, name: str, dtype: torch.dtype) -> Path:
        """The folder of a model, written where it is not there."""
        if name == "7b" and self.folder:
            return self.folder
        folder = self.work / name
        self.tell(f"{name}: writing random weights, {models.stored_bytes(models.MODELS[name], dtype) / 1e9:.1f} GB")
        models.write_random(models.MODELS[name], folder, dtype)
        return folder

    # ------------------------------------------------------------ loading

    def load(self, name: str, config: LlavaConfig, folder: Path, dtype: torch.dtype) -> Row:
        """Each in a fresh process, a plain read of the same files beside it."""
        self.tell(f"{name}: load")
        size, peaks = models.stored_bytes(config, dtype), {"ours": [], "theirs": []}

        def work(who: str) -> ours.Work:
            def once(repetition: int) -> ours.Done:
                done = load.in_new_process(who, folder, self.device, dtype)
                peaks[who].append(done["peak"] / size)
                return ours.Done(size / 1e9 / done["seconds"], torch.zeros(1))

            return once

        row, large = Row(name, "load", "GB/s", limit="plain read"), size > 2e9
        row.limit_value = max(load.read_rate(folder) for _ in range(1 if large else 3))
        theirs = work("theirs") if self.theirs else None
        alternate(row, work("ours"), theirs, pairs=1 if large else 2, tolerance=None, warm=False)
        row.amounts = [1e9] * len(row.ours)
        row.detail = {"peak of ours": peaks["ours"], "peak of theirs": peaks["theirs"], "weights": [size]}
        scale, unit = (1, "x the weights") if size > 1e8 else (size / 1e6, " MB")  # nothing can be said of less
        told = [f"{scale * max(values):.{2 if scale == 1 else 0}f}" for values in peaks.values() if values]
        row.note = f"peak memory {' and '.join(told)}{unit}"
        return row

    # ------------------------------------------------------------ inference

    def inference(self, name: str, config: LlavaConfig, folder: Path) -> Iterator[Row]:
        effort, tolerance = self.efforts[name], self.tolerance
        mine = nanollava.load(folder, self.device, self.dtype)
        other = reference.load(folder, self.device, self.dtype) if self.theirs else None
        pixels = models.picture(config).to(self.device, self.dtype)
        self.tell(f"{name}: tower")
        row = self.row(name, "tower", "images/s", count.tower_operations(config.vision, count.tower_blocks(config)))
        alone = reference.tower(other, pixels) if other else None
        yield alternate(row, ours.tower(mine, pixels), alone, effort.pairs, tolerance)

        self.tell(f"{name}: prefill")
        positions = config.vision.num_patches + models.TEXT
        x = torch.randn(1, positions, config.language.hidden_size, generator=torch.Generator().manual_seed(3))
        x = (0.02 * x).to(self.device, self.dtype)
        operations = count.decoder_operations(config.language, positions, count.causal_pairs([positions]))
        operations += count.head_operations(config.language, 1)
        row = self.row(name, "prefill", "positions/s", operations / positions)
        alone = reference.prefill(other, x, mine.config.language.vocab_size) if other else None
        yield alternate(row, ours.prefill(mine, x), alone, effort.pairs, tolerance)

        for how, (prepare, exact) in list(ours.DECODERS.items())[: None if effort.compiled else 1]:
            self.tell(f"{name}: {how}")
            model = prepare(mine)
            held = positions + effort.tokens / 2  # in the cache, on average
            read = count.cache_bytes(config.language, held, self.dtype.itemsize) + count.weight_bytes(model.language)
            row = self.row(name, how, "tokens/s", read, "vector")
            asked = models.prompt(config), pixels, effort.tokens
            alone = reference.decode(other, *asked) if other and exact else None
            same = None if self.on_cuda else 0.0  # bfloat16 leaves ties, and what follows another token differs
            yield alternate(row, ours.decode(model, *asked), alone, effort.pairs, same)

    @property
    def tolerance(self) -> float:
        """How far results of both may be apart: roundings through some thirty blocks."""
        return 5e-2 if self.on_cuda else 1e-4

    def row(self, name: str, work: str, unit: str, amount: float, limit: str = "product") -> Row:
        pairs = self.efforts[name].pairs
        return Row(name, work, unit, amounts=[amount] * pairs, limit=limit, limit_value=getattr(self.limits, limit))
