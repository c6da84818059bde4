"""The rows of training: a step on packed rows against one on padded batches of similar length, the same records in
each. Both hold a few records in memory at a time, and add up the gradients of a step."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import nanollava
from nanollava.bench import models, ours, reference
from nanollava.bench import operations as count
from nanollava.bench.batches import Drawn, grouped, make_examples, padded, spliced
from nanollava.bench.machine import free_memory, lack
from nanollava.bench.rows import Row, alternate, in_turn, settle
from nanollava.conversation import IGNORE
from nanollava.train import budget
from nanollava.train.stages import STAGES

if TYPE_CHECKING:
    from nanollava.bench.measure import Bench


def rows(bench: "Bench", name: str, folder: Path) -> Iterator[Row]:
    """A row for each stage; one that the machine cannot hold says so."""
    for work, stage, options in recipes(name, bench.on_cuda):
        bench.tell(f"{name}: {work}")
        training = Training(bench, name, work, stage, folder, options)
        if (needed := training.memory()) > free_memory(bench.device):
            training.made = Row(name, work, note=f"skipped: {lack(needed, bench.device)}")
            yield training.made
        else:
            yield training.row()
        del training
        gc.collect()  # models and their gradient hooks refer to each other


def recipes(name: str, on_cuda: bool) -> Iterator[tuple[str, str, dict]]:
    """(row, stage, options of our run): a 7B model trains as one card holds it."""
    shared = {"recompute": name == "7b", "compile": on_cuda}
    yield "stage 1 step", "stage1", shared
    yield "stage 2 step", "stage2", shared | ({"optimizer": "light"} if name == "7b" else {})
    if name == "7b":
        yield "stage 2 step, LoRA", "stage2", shared | {"lora": 128, "lora_alpha": 256.0, "lora_dropout": 0.0}


class Training:
    """One row: steps of one stage."""

    def __init__(self, bench: "Bench", name: str, work: str, stage: str, folder: Path, options: dict):
        self.bench, self.stage, self.folder, self.options = bench, stage, folder, options
        self.config, self.effort = models.MODELS[name], bench.efforts[name]
        records, steps = self.effort.records, self.effort.steps
        examples = make_examples(self.config, stage, records * steps)
        self.data = Drawn(examples, self.config)
        self.steps = [range(first, first + records) for first in range(0, records * steps, records)]
        labels = [[spliced(examples[n], self.config).labels for n in step] for step in self.steps]
        self.useful = [sum(map(len, step)) for step in labels]  # positions of a step, images' included
        limit = bench.limits.product
        self.made = Row(name, work, "useful tokens/s", limit="product", limit_value=limit)
        for step, useful in zip(labels, self.useful, strict=True):
            targets, lengths = sum(t != IGNORE for row in step for t in row[1:]), list(map(len, step))
            trained = STAGES[stage].trained
            operations = count.step_operations(self.config, lengths, targets, len(step), trained)
            self.made.amounts.append(operations / useful)

    def memory(self) -> float:
        """Bytes that both take, which hold weights and states at the same time, but not activations."""
        on_cuda, config, options = self.bench.on_cuda, self.config, self.options
        how = budget.How(on_cuda, options.get("optimizer", "adamw"), options.get("lora"), 0.0, options["recompute"])
        outline = budget.outline(config, STAGES[self.stage], how)
        length, parts = config.max_length, -(-self.effort.records // self.effort.at_once)
        work = budget.Work(self.effort.rows, length, length * self.effort.rows // 2, self.effort.at_once, parts)
        ours = budget.estimate(outline, how, work)
        if not self.bench.theirs or options["recompute"]:
            return ours.peak
        logits = (
            3 * 4 * self.effort.rows * length * config.language.vocab_size
        )  # theirs: of all positions, with gradients
        return ours.peak + ours.weights + ours.states + logits

    def row(self) -> Row:
        """Side by side; one after the other where a card does not hold both."""
        tolerance, effort = 2e-2 if self.bench.on_cuda else 1e-4, self.effort
        both = self.bench.theirs
        if not (both and self.options["recompute"]):
            works = self.packed(), self.right_padded() if both else None
            return alternate(self.made, *works, effort.steps, tolerance, effort.warm)
        (mine,) = in_turn([self.packed()], effort.steps, effort.warm)
        gc.collect()
        torch.cuda.empty_cache()
        (other,) = in_turn([self.right_padded()], effort.steps, effort.warm)
        self.made.note = "one after the other"
        return settle(self.made, mine, other, tolerance)

    def packed(self) -> ours.Work:
        """train.py's step on packed batches."""
        bench, name = self.bench, "padding of ours"
        model = nanollava.load(self.folder, bench.device, bench.dtype)
        rows = self.effort.rows
        run = ours.trainer(model, self.stage, self.data, self.effort.records, rows_at_once=rows, **self.options)
        batches = [self.data.batches(step, rows) for step in self.steps]
        positions = [sum(batch.labels.numel() for batch in step) for step in batches]
        self.made.detail[name] = [1 - a / b for a, b in zip(self.useful, positions, strict=True)]
        work = ours.training(run, batches, self.useful)
        return self.watched(work) if bench.on_cuda else work

    def watched(self, work: ours.Work) -> ours.Work:
        """The most memory that tensors took on the card, in GB, beside each figure."""

        def once(repetition: int) -> ours.Done:
            torch.cuda.reset_peak_memory_stats(self.bench.device)
            done = work(repetition)
            taken = torch.cuda.max_memory_allocated(self.bench.device) / 1e9
            self.made.detail.setdefault("memory in GB", []).append(taken)
            return done

        return once

    def right_padded(self) -> ours.Work:
        """transformers on padded batches. On CUDA weights are float32 under autocast, as ours; bfloat16 for 7B, whose
        AdamW would not fit a card otherwise."""
        bench, large = self.bench, self.options["recompute"]
        dtype = torch.float32 if bench.on_cuda and not large else bench.dtype
        model = reference.load(self.folder, bench.device, dtype)
        step = reference.trainer(model, self.stage, self.options.get("lora"), large)
        image, size = model.config.image_token_index, self.effort.at_once
        of_step = [grouped(self.data, step, size) for step in self.steps]
        batches = [[reference.moved(padded(self.data, some, image), bench.device) for some in g] for g in of_step]
        positions = [sum(batch["labels"].numel() for batch in some) for some in batches]
        self.made.detail["padding of theirs"] = [1 - a / b for a, b in zip(self.useful, positions, strict=True)]
        return reference.training(step, batches, self.useful)
