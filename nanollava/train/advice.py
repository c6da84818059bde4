"""What a run takes, in words: the budget as a table, the cards it would fit on, what to lower where it does not fit and
what that saves. Told before a run (--dry-run), and when memory runs out in one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from nanollava.error import Error, out_of_memory
from nanollava.llava import Batch, LlavaConfig
from nanollava.loss import CHUNK
from nanollava.train import lora
from nanollava.train.budget import GB, How, Work, estimate, outline
from nanollava.train.stages import Stage, parameter_table

if TYPE_CHECKING:
    from nanollava.train.loop import Run

CARDS = (8, 16, 24, 48, 80)  # their GB are 2^30 bytes: of the 7% more than 10^9, CUDA itself takes most
Remedy = tuple[str, How, Work]  # an option, and the run with it


def report(config: LlavaConfig, stage: Stage, how: How, work: Work) -> str:
    """The run as it is asked for, and the cards that it would fit on."""
    model = outline(config, stage, how)
    budget = estimate(model, how, work)
    logits = f"logits of {min(work.targets, CHUNK)} positions at a time, the head's gradient"
    kinds = {
        "weights": budget.weights,
        "gradients": budget.gradients,
        "optimizer states": budget.states,
        f"activations of {work.rows} rows of {work.length:,} positions": budget.activations,
        logits: budget.loss,
        f"activations of the tower, {work.images} images": budget.tower,
        "beside the gradients, as weights are updated": budget.update,
        "at the same time, at most": budget.live,
        **({} if how.on_cuda else {"this process, with gaps between freed tensors, about": budget.peak}),
    }
    lines = [f"{name:<60} {size / GB:>8.2f} GB" for name, size in kinds.items()]
    on_card = replace(how, on_cuda=True, parallel=1)
    cards = [f"{card:>3} GB card: {advice(config, stage, on_card, work, card * GB)}" for card in CARDS]
    return "\n".join([parameter_table(model), "", *lines, "", *cards])


def advice(config: LlavaConfig, stage: Stage, how: How, work: Work, room: float) -> str:
    """Whether it fits into so many bytes; if not, which options would make it fit, and what each saves."""
    peak = peak_of(config, stage)
    if (needed := peak(how, work)) <= room:
        return f"fits, with {needed / GB:.1f} GB"
    tried = []
    for other in [[remedy] for remedy in new_run(config, stage, *smallest(how, work))] or [[]]:
        left, saved = needed, []
        for option, gain, left in savings(peak, needed, [*smaller(how, work), *other]):
            saved.append(f"{option} saves {gain / GB:.1f}")
            if left <= room:
                return f"too small for {needed / GB:.1f} GB; {', '.join(saved)}: fits, with {left / GB:.1f} GB"
        tried.append((left, saved))
    least, saved = min(tried)
    return f"too small for {needed / GB:.1f} GB; {', '.join(saved) or 'no option helps'}: still {least / GB:.1f} GB"


def peak_of(config: LlavaConfig, stage: Stage) -> Callable[[How, Work], int]:
    return lambda how, work: estimate(outline(config, stage, how), how, work).peak


def savings(peak: Callable[[How, Work], int], needed: int, remedies: list[Remedy]) -> Iterator[tuple[str, int, int]]:
    """(option, bytes that it saves, bytes still needed), one after the other; none for what saves hardly anything."""
    for option, *with_it in remedies:
        left = peak(*with_it)
        if left < 0.99 * needed:
            yield option, needed - left, left
            needed = left


def smaller(how: How, work: Work) -> list[Remedy]:
    """Options that change no loss, each with those before it: a run may be resumed with them."""
    one = replace(work, rows=1, parts=work.parts * work.rows, targets=-(-work.targets // work.rows))
    one = replace(one, images=-(-work.images // work.rows))
    alone = replace(how, parallel=1)
    less = replace(alone, recompute=True)
    if how.optimizer == "light":  # gradients of earlier micro-batches wait: fewer rows may take more than they save
        return [("--parallel 1", alone, work), ("--recompute", less, work), ("--rows-at-once 1", less, one)]
    return [("--rows-at-once 1", how, one), ("--parallel 1", alone, one), ("--recompute", less, one)]


def smallest(how: How, work: Work) -> tuple[How, Work]:
    """The run with all of these."""
    return smaller(how, work)[-1][1:]


def new_run(config: LlavaConfig, stage: Stage, how: How, work: Work) -> list[Remedy]:
    """Options that make another run of it, each by itself: a lighter optimizer, or adapters."""
    c = config.language
    width = min(c.hidden_size, c.intermediate_size, c.num_key_value_heads * c.head_dim)
    light = ("--optimizer light", replace(how, optimizer="light"), work)
    adapted = replace(how, lora=lora.RANK, dropout=lora.DROPOUT, optimizer="adamw")
    fits = "language" in stage.trained and width >= lora.RANK
    return [] if how.lora else [light, *([(f"--lora {lora.RANK}", adapted, work)] if fits else [])]


# ---------------------------------------------------------------- in mid-run


@contextmanager
def explain_shortage(run: "Run", batches: list[Batch]) -> Iterator[None]:
    """Raises Error where memory runs out inside, in a step on these micro-batches: with what to lower, and what that
    saves."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        how = How.of(run.options, str(run.device))
        work = Work.largest(batches, how.parallel)
        raise Error(shortage(run.model.config, run.stage, how, work, run.step, run.saved)) from error


def shortage(config: LlavaConfig, stage: Stage, how: How, work: Work, step: int, saved: int) -> str:
    """One line for a step that did not fit; ``saved`` is the step of the last checkpoint, 0 where there is none."""
    peak = peak_of(config, stage)
    found = [f"{option} saves {size(gain)}" for option, gain, _ in savings(peak, peak(how, work), smaller(how, work))]
    again = f"with --resume to go on from step {saved}" if saved else "and start again"
    words = [f"{', '.join(found)}: give {'it' if len(found) == 1 else 'them'} {again}"] if found else []
    least = smallest(how, work)
    others = [savings(peak, peak(*least), [remedy]) for remedy in new_run(config, stage, *least)]
    gains = [f"{option} saves {size(gain)}" for other in others for option, gain, _ in other]
    words += [f"in a new run {' or '.join(gains)}"] if gains else []
    words += [] if found else [f"a --max-length below {config.max_length:,}, or more GPUs by torchrun, would help"]
    rows = f"{work.rows} row{'s' * (work.rows > 1)} of {work.length:,} positions at once"
    return f"step {step} does not fit into memory, with {rows}: {'; '.join(words)}"


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 1e6:.1f} MB"
