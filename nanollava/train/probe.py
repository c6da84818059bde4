"""Ten steps of a run that saves nothing: how long it will take, and whether the memory is what the budget said."""

import time
from itertools import islice

from nanollava.llava import Llava
from nanollava.train.advice import explain_shortage
from nanollava.train.budget import GB, Work
from nanollava.train.data import Dataset, draw_steps
from nanollava.train.loop import Options, Run
from nanollava.train.machine import peak_memory, share_cores
from nanollava.train.stages import Stage

STEPS = 10
LARGE = 1.0  # GB: below, what libraries keep decides: oneDNN's code for each shape of a bfloat16 matrix


def largest(data: Dataset, options: Options, parallel: int) -> Work:
    """The largest micro-batch of the steps that ``probe`` will make."""
    draws = islice(draw_steps(len(data), options.batch_size, options.seed), min(STEPS, options.steps))
    steps = (data.batches(numbers, options.rows_at_once, parallel) for numbers in draws)
    return max((Work.largest(batches, parallel) for batches in steps), key=Work.size)


def probe(model: Llava, stage: Stage, data: Dataset, options: Options, before: float, estimate: int) -> str:
    """Train ten steps, in place, and tell what they took; ``before`` is the memory in GB that was taken without the
    model, ``estimate`` the budget's peak in bytes."""
    run, times = Run(model, stage, data, None, None, options), []
    run.prepare()
    with share_cores(run.parallel) as run.pool:
        began = time.perf_counter()
        for batches in islice(run.prefetch(), STEPS):
            with explain_shortage(run, batches):
                run.update(batches)
            times.append(time.perf_counter() - began)
            began = time.perf_counter()
    run.check_learnt()
    settled = times[1:] or times  # the first takes memory, and may compile
    seconds, peak = sum(settled) / len(settled), max(0, peak_memory(model.device) - before)
    off = f" ({100 * (estimate / GB / peak - 1):+.0f}%)" if peak > LARGE else "; libraries decide in so small a run"
    return (
        f"a probe of {len(times)} steps: {seconds:.2f} s a step, so {options.steps:,} steps take about "
        f"{seconds * options.steps / 3600:.2f} hours, without validation and saving\n"
        f"peak of memory: {peak:.2f} GB measured, {estimate / GB:.2f} GB estimated{off}"
    )
