"""Our library at work. Each kind of work gives its rate, and what it computed, so that both can be compared."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nanollava import generate
from nanollava.bench.batches import Drawn
from nanollava.bench.limits import seconds, wait
from nanollava.decoding import compile_decoding
from nanollava.generate import Sampling
from nanollava.llama import Cache
from nanollava.llava import Batch, Llava
from nanollava.quantize import quantize
from nanollava.train.loop import Options, Run
from nanollava.train.stages import STAGES


class Done(NamedTuple):
    """Work that was timed."""

    rate: float  # units a second
    result: Tensor  # float64 on the CPU


Work = Callable[[int], Done]  # the number of the repetition -> what was done


def tower(model: Llava, pixels: Tensor) -> Work:
    """(M, 3, S, S) -> features, images a second."""
    return timed(model.device, len(pixels), lambda: model.vision(pixels, model.config.select_layer))


def prefill(model: Llava, x: Tensor) -> Work:
    """(1, T, D) embeddings -> logits of the last position, with keys and values of all kept; positions a second."""

    def work() -> Tensor:
        cache = Cache(model.language.config, 1, x.shape[1] + 1, x.device, x.dtype)
        return model.language.lm_head(model.language.hidden(x, cache=cache)[:, -1])

    return timed(x.device, x.shape[1], work)


def timed(device: torch.device, units: int, function: Callable[[], Tensor]) -> Work:
    """Work whose rate is ``units`` by the seconds that it takes."""

    def work(repetition: int) -> Done:
        results = []
        with torch.inference_mode():
            taken = seconds(device, lambda: results.append(function()))
        return Done(units / taken, results[0].double().cpu())

    return work


def decode(model: Llava, prompt: list[int], pixels: Tensor, tokens: int) -> Work:
    """Greedy, one sequence: tokens a second behind the first, which the prefill gives."""

    def work(repetition: int) -> Done:
        steps = generate.decode(model, [prompt], pixels, Sampling(max_new_tokens=tokens), None)
        (answer,) = next(steps)
        wait(model.device)
        taken = seconds(model.device, lambda: [None for _ in steps])
        return Done((len(answer.ids) - 1) / taken, torch.tensor(answer.ids).double())

    return work


class Decoder(NamedTuple):
    """A way to decode: what is done to a model for it, and whether its answers are still those of its weights."""

    prepare: Callable[[Llava], Llava]
    exact: bool


DECODERS = {  # by their rows; each changes the model for good, and those behind it build on that
    "decode": Decoder(lambda model: model, exact=True),
    "decode, compiled": Decoder(compile_decoding, exact=True),
    "decode, int8": Decoder(quantize, exact=False),
}


def trainer(model: Llava, stage: str, data: Drawn, size: int, **options: object) -> Run:
    """train.py's run on a model, nothing written. At rate 0 a step does all its work and leaves the weights, so that
    every repetition can be compared."""
    chosen = Options(lr=0.0, projector_lr=None, batch_size=size, steps=10**6, **options)
    run = Run(model.train(), STAGES[stage], data, None, Path("unused"), chosen)
    run.prepare()
    return run


def training(run: Run, steps: list[list[Batch]], useful: list[int]) -> Work:
    """Optimizer steps on packed batches, in useful positions a second: padding does not count."""

    def work(repetition: int) -> Done:
        told = []
        taken = seconds(run.model.device, lambda: told.append(run.update(steps[repetition])))
        return Done(useful[repetition] / taken, learnt(told[0]["loss"], told[0]["grad_norm"]))

    return work


def learnt(loss: float, norm: float) -> Tensor:
    """What a step came to: loss, and the norm of its gradients. As logarithms, so that a small one counts as much."""
    return torch.tensor([loss, norm]).double().log()
