"""One training loop for both stages and the miniature's language model: draw groups, pack, add up the loss of a step,
update, report, save; resume.py keeps the run's folder."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from nanollava.attention import can_compile
from nanollava.error import Error
from nanollava.llava import Batch, Llava
from nanollava.progress import minutes
from nanollava.train import lora
from nanollava.train.advice import explain_shortage
from nanollava.train.blocks import prepare_blocks
from nanollava.train.data import Dataset, count_targets, draw_steps
from nanollava.train.distributed import full, idle, level, processes, rank, shard, summed, union
from nanollava.train.keep import alone
from nanollava.train.machine import deferred_interrupt, keep_freed_memory, peak_memory, share_cores
from nanollava.train.optim import make_optimizers, set_learning_rate, warmup_cosine
from nanollava.train.resume import check_out, image_sizes, restore, save
from nanollava.train.stages import STAGES, Stage, freeze, parameter_table, set_precision

AHEAD = 3  # steps: enough that one slow batch, or a save, makes no other wait


@dataclass
class Options:
    """Settings of a run. Those that shape the losses are stored, and must be the same on --resume."""

    lr: float
    projector_lr: float | None  # None: as lr
    batch_size: int  # groups of examples in a step
    steps: int
    warmup: float = 0.03  # share of the steps
    clip: float = 1.0  # largest norm of the gradient
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    rows_at_once: int = 0  # rows in memory at once: fewer means gradient accumulation; 0 is all
    parallel: int = 1  # micro-batches computed side by side on a CPU, each with gradients and a share of the cores
    seed: int = 0
    val_every: int = 0  # steps between validation losses; 0: only at the end
    save_every: int = 0  # steps between checkpoints; 0: only at the end
    keep: int = 1  # of them, the last so many stay
    log_every: int = 10
    compile: bool = False
    recompute: bool = False  # activations of the decoder's blocks, in backward, in place of keeping them
    lora: int | None = None  # rank of the adapters that are trained in place of the decoder's own weights; None: these
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    base: str = ""  # what the adapters' base is called


def train(
    model: Llava,
    stage: Stage,
    data: Dataset,
    val: Dataset | None,
    out: Path,
    options: Options,
    resume: bool = False,
    device: str | None = None,
) -> None:
    """Train in place and leave the result in the folder ``out``. Raises Error where ``out`` does not suit.

    device: where each of several processes keeps its share of the model; None: where the model is.
    """
    with alone(out):
        check_out(out, resume)
        Run(model, stage, data, val, out, options, device).run(resume)


class Run:
    """One training run: the model, its optimizers, and how far it has come."""

    def __init__(
        self,
        model: Llava,
        stage: Stage,
        data: Dataset,
        val: Dataset | None,
        out: Path,
        options: Options,
        device: str | None = None,
    ):
        self.model, self.stage, self.data, self.val, self.out, self.options = model, stage, data, val, out, options
        self.device = torch.device(device) if device else model.device
        self.base = self.shape_model()
        model.config.stage = stage.name if stage.name in STAGES else ""
        model.config.template = stage.template
        self.on_cuda = self.device.type == "cuda"
        self.parallel = options.parallel if self.device.type == "cpu" and processes() == 1 else 1
        self.rates = {"projector": options.projector_lr or options.lr, "language": options.lr}
        parts = [(getattr(model, part), self.rates[part]) for part in stage.trained]
        self.optimizers = make_optimizers(parts, options.optimizer, options.weight_decay, options.clip, options.seed)
        self.light = self.optimizers[0] if options.optimizer == "light" else None  # updates inside backward
        self.step, self.saved, self.metrics = 0, 0, []
        self.image_sizes = image_sizes(data)  # now: a disk can go away in mid-run
        self.tokens, self.positions, self.targets = 0, 0, 0  # trained on since this process began
        self.waited, self.started, self.first = 0.0, time.perf_counter(), 0

    def shape_model(self) -> str:
        """Freeze, choose dtypes, add adapters, cut into shares; what tells the base of adapters from others."""
        model, options = self.model, self.options
        freeze(model, self.stage)
        set_precision(model, self.stage, options.optimizer, bool(options.lora), self.device)
        if options.lora:
            lora.adapt(model, options.lora, options.lora_alpha, options.lora_dropout)
        base = lora.base_checksum(model) if options.lora else ""
        shard(model, self.device)
        return base

    def run(self, resume: bool) -> None:
        if resume:
            restore(self)
        print(parameter_table(self.model), flush=True)
        self.prepare()
        with share_cores(self.parallel) as self.pool, deferred_interrupt() as interrupted:
            self.loop(interrupted)
            self.check_learnt()
            save(self, final=True)
        for data in filter(None, (self.data, self.val)):
            data.broken = union(data.broken)
            if damage := data.damage():
                print(damage, flush=True)

    def check_learnt(self) -> None:
        if not self.targets:
            raise Error("nothing was learnt: no record that could be read has an answer within --max-length; see above")

    def prepare(self) -> None:
        """Keep freed memory, compile, recompute: not before --resume has brought its weights."""
        keep_freed_memory()
        compiling = self.options.compile and can_compile(self.device.type)
        prepare_blocks(self.model.language, self.options.recompute, compiling)
        if compiling and self.light:
            self.light.compile()

    def loop(self, interrupted: Callable[[], bool]) -> None:
        self.first, self.started = self.step, time.perf_counter()
        for batches in self.prefetch():
            last = self.step + 1 == self.options.steps
            with explain_shortage(self, batches):
                entry = self.update(batches)
                if self.val and (last or (self.options.val_every and self.step % self.options.val_every == 0)):
                    entry["val_loss"] = self.validate()
            unread = None
            try:
                self.report(entry, last)
            except OSError as error:  # nobody reads what is printed any more, or a log's disk is full
                unread = error
            due = self.options.save_every and self.step % self.options.save_every == 0
            (stop,) = summed(bool(interrupted() or unread))  # asked once: the save that it promises precedes the end
            if unread or (not last and (due or stop)):
                save(self, final=last)
            if unread:
                raise unread
            if not last and stop:
                raise KeyboardInterrupt

    def update(self, batches: list[Batch]) -> dict:
        """One optimizer step on micro-batches; the loss is the mean over all their target tokens, or None where they
        have none (all of their images were damaged): then nothing is updated."""
        share = warmup_cosine(self.step, self.options.steps, self.options.warmup)
        set_learning_rate(self.optimizers, share)
        rates = {"lr": share * self.options.lr, "projector_lr": share * self.rates["projector"]}
        self.step += 1
        batches = level(batches)
        (targets,), padding = summed(count_targets(batches)), self.count_padding(batches)
        if not targets:
            return {"step": self.step, "loss": None, **rates, "grad_norm": None, "padding": padding}
        self.targets += targets
        if self.options.lora:
            lora.seed_dropout(self.model, self.options.seed, self.step)
        without = idle(self.model, batches)
        if self.light:
            self.light.idle = without
        (loss,) = summed(self.backward(batches, targets))
        for p in without:
            p.grad = None
        grad_norm = self.light.finish() if self.light else self.clip()
        if not math.isfinite(loss + grad_norm):
            what = "gradient" if math.isfinite(loss) else "loss"
            raise Error(f"step {self.step}: the {what} is not a finite number; start again with a lower --lr")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return {"step": self.step, "loss": loss, **rates, "grad_norm": grad_norm, "padding": padding}

    def clip(self) -> float:
        """The norm of all gradients; where it is above --clip they are scaled down to it."""
        gradients = [p for p in self.model.parameters() if p.grad is not None]
        return full(nn.utils.clip_grad_norm_(gradients, self.options.clip)).item()

    def count_padding(self, batches: list[Batch]) -> float:
        """The share of a step's positions that hold nothing; all are added to what the run has seen."""
        filled = sum(int((b.documents >= 0).sum()) for b in batches)
        tokens, positions = summed(filled, sum(b.documents.numel() for b in batches))
        self.tokens, self.positions = self.tokens + tokens, self.positions + positions
        return round(1 - tokens / positions, 4) if positions else 0.0

    def backward(self, batches: list[Batch], targets: float) -> float:
        """The summed loss of the micro-batches over ``targets``, the number of a whole step, and its gradients."""
        if self.parallel > 1:
            return self.backward_side_by_side(batches, targets)
        total = 0.0
        for left, batch in zip(reversed(range(len(batches))), batches, strict=True):
            loss = self.loss(batch) / targets
            if self.light:
                self.light.due = not left
            loss.backward()
            total += loss.item()
        return total

    def backward_side_by_side(self, batches: list[Batch], targets: float) -> float:
        """The same in threads. They return gradients, which are added up here: threads may not add to one ``p.grad`` at
        the same time."""
        params, total = [p for p in self.model.parameters() if p.requires_grad], 0.0

        def gradients(batch: Batch) -> tuple[float, tuple]:
            loss = self.loss(batch) / targets
            return loss.item(), torch.autograd.grad(loss, params, allow_unused=True)

        for loss, grads in self.pool.map(gradients, batches):
            total += loss
            for p, grad in zip(params, grads, strict=True):
                if grad is not None:
                    p.grad = grad if p.grad is None else p.grad.add_(grad)
        return total

    def loss(self, batch: Batch) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.on_cuda):
            return self.model.loss(batch.to(self.model.device))

    def prefetch(self) -> Iterator[list[Batch]]:
        """Batches of the remaining steps in order; those of the next ``AHEAD`` are made while one is trained on."""
        numbers = draw_steps(len(self.data), self.options.batch_size, self.options.seed, self.step)
        rest = islice(numbers, self.options.steps - self.step)
        make = lambda chosen: self.batches(self.data, chosen)  # noqa: E731
        pool = ThreadPoolExecutor(1)
        try:
            ahead = deque(pool.submit(make, chosen) for chosen in islice(rest, AHEAD))
            while ahead:
                began = time.perf_counter()
                batches = ahead.popleft().result()
                self.waited += time.perf_counter() - began
                ahead.extend(pool.submit(make, chosen) for chosen in islice(rest, 1))
                yield batches
        finally:
            pool.shutdown(cancel_futures=True)

    def batches(self, data: Dataset, numbers: Iterable[int]) -> list[Batch]:
        """This process's share of those groups."""
        return data.batches(numbers, self.options.rows_at_once, self.parallel, (rank(), processes()))

    def validate(self) -> float | None:
        """Mean loss over the target tokens of the validation set; None where it has none."""
        total, targets = 0.0, 0
        self.model.eval()
        for first in range(0, len(self.val), self.options.batch_size):
            numbers = range(first, min(first + self.options.batch_size, len(self.val)))
            batches = level(self.batches(self.val, numbers))
            side_by_side = self.pool.map if self.parallel > 1 else map  # another thread has another default device
            total += sum(side_by_side(self.loss_alone, batches))
            targets += count_targets(batches)
        total, targets = summed(total, targets)
        return total / targets if targets else None

    @torch.no_grad()
    def loss_alone(self, batch: Batch) -> float:
        return self.loss(batch).item()

    def report(self, entry: dict, last: bool) -> None:
        """A line of metrics for every step, a line on the terminal for some."""
        elapsed = time.perf_counter() - self.started
        entry["tokens_per_s"] = round(self.tokens / elapsed)
        self.metrics.append(entry)
        if last or "val_loss" in entry or self.step % self.options.log_every == 0 or self.step == self.first + 1:
            left = elapsed / (self.step - self.first) * (self.options.steps - self.step)
            losses = {"loss": entry["loss"]} | ({"val": entry["val_loss"]} if "val_loss" in entry else {})
            told = "  ".join(f"{name} none" if x is None else f"{name} {x:.4f}" for name, x in losses.items())
            print(
                f"{self.stage.name} {self.step:>5}/{self.options.steps}  {told}  "
                f"{entry['tokens_per_s']:,} tokens/s  padding {100 * (1 - self.tokens / max(1, self.positions)):.0f}%  "
                f"waiting for data {100 * self.waited / elapsed:.0f}%  "
                f"{peak_memory(self.model.device):.1f} GB  {minutes(left)} left",
                flush=True,
            )
