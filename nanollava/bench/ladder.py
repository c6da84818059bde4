"""What some optimisations bring: the plain way, each improvement on its own, all of them.

The ways without them live here and nowhere else. All steps of a ladder compute the same, which is checked.
"""

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import nanollava
from nanollava import attention, llama, llava, vit
from nanollava.bench import models, ours
from nanollava.bench.batches import Drawn, make_examples
from nanollava.bench.limits import seconds
from nanollava.bench.report import markdown, number
from nanollava.bench.rows import difference
from nanollava.error import Error
from nanollava.llama import Cache
from nanollava.llava import Batch, Llava
from nanollava.train.data import collate, documents

PLAIN_TOKENS, TOKENS, RECORDS, REPETITIONS = 4, 32, 4, 2
Rung = tuple[str, Callable[[], tuple[float, Tensor]]]  # what is done, and: rate, result


def main(device: torch.device, tell: Callable[[str], None], name: str = "135m") -> int:
    """Measure and print the table."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lines = []
    with tempfile.TemporaryDirectory(prefix="nanollava-bench-") as work:
        tell(f"{name}: writing random weights")
        models.write_random(models.MODELS[name], Path(work) / name, dtype)
        model = nanollava.load(Path(work) / name, device, dtype)
        for title, unit, steps in (decoding(model), prefill(model), training(model)):
            tell(f"{name}: {title}")
            lines += measured(title, unit, steps, tell)
    print(markdown(("work", "how", "rate", "gain"), "llrr", lines), flush=True)
    return 0


def measured(title: str, unit: str, steps: list[Rung], tell: Callable[[str], None]) -> list[tuple[str, ...]]:
    """Lines of the table; the gain is that over the first step, the plain one. Raises Error where results differ."""
    rates, results = {name: [] for name, _ in steps}, []
    for repetition in range(REPETITIONS + 1):  # the first warms up
        for name, work in steps:
            rate, result = work()
            tell(f"  {name}: {number(rate)} {unit}")
            rates[name] += [rate] if repetition else []
            results.append(result)
            if (apart := difference(result, results[0])) > 5e-2:
                raise Error(f"{title}, {name}: computes something else than the plain way, by {apart:.1e}")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    first = medians[steps[0][0]]
    return [(title, name, f"{number(rate)} {unit}", f"{rate / first:.2f}x") for name, rate in medians.items()]


# ---------------------------------------------------------------- decoding and prefill


def decoding(model: Llava) -> tuple[str, str, list[Rung]]:
    """A token behind 640 positions, by reading everything again or from the cache."""
    prompt, pixels = models.prompt(model.config), models.picture(model.config).to(model.device)

    def again() -> tuple[float, Tensor]:
        ids, patches = model.splice_rows([prompt], 1)
        columns = (torch.tensor(column, device=model.device) for column in (ids, patches))
        x, made = model.embed(*columns, pixels), []

        def token() -> None:
            nonlocal x
            made.append(model.language.lm_head(model.language.hidden(x)[:, -1]).argmax(-1))
            x = torch.cat([x, model.language.embed_tokens(made[-1])[:, None]], dim=1)

        token()
        taken = seconds(model.device, lambda: [token() for _ in range(PLAIN_TOKENS)])
        return PLAIN_TOKENS / taken, torch.cat(made).double().cpu()

    def cached() -> tuple[float, Tensor]:
        done = ours.decode(model, prompt, pixels, TOKENS)(0)
        return done.rate, done.result[: PLAIN_TOKENS + 1]

    steps = [("everything read again", torch.inference_mode()(again)), ("cache", cached)]
    return "decode", "tokens/s", steps


def prefill(model: Llava) -> tuple[str, str, list[Rung]]:
    """640 positions, with attention as the equation has it or fused, with logits of all or of the last."""
    T, D = model.config.vision.num_patches + models.TEXT, model.config.language.hidden_size
    x = (0.02 * torch.randn(1, T, D, generator=torch.Generator().manual_seed(3))).to(model.device)
    x = x.to(model.language.norm.weight.dtype)

    def all_logits() -> Tensor:
        cache = Cache(model.language.config, 1, T + 1, x.device, x.dtype)
        return model.language.lm_head(model.language.hidden(x, cache=cache))[:, -1]

    def step(work: ours.Work, plain: bool) -> Callable[[], tuple[float, Tensor]]:
        def run() -> tuple[float, Tensor]:
            with plain_attention() if plain else contextlib.nullcontext():
                return work(0)

        return run

    every, last = ours.timed(x.device, T, all_logits), ours.prefill(model, x)
    steps = [
        ("plain attention, logits of all positions", step(every, True)),
        ("scaled_dot_product_attention", step(every, False)),
        ("logits of the last position", step(last, True)),
        ("both", step(last, False)),
    ]
    return "prefill", "positions/s", steps


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Every layer takes the equation as it stands."""
    plain = partial(attention.attention, how="plain")
    with replaced(llama, "attention", plain), replaced(vit, "attention", plain):
        yield


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Another value for an attribute, for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# ---------------------------------------------------------------- training


def training(model: Llava) -> tuple[str, str, list[Rung]]:
    """Stage 2 on padded rows, with a table of logits and with gradients in a tower of which all blocks are run, or
    without each of them."""
    examples = make_examples(model.config, "stage2", RECORDS)
    data = Drawn(examples, model.config)
    run = ours.trainer(model, "stage2", data, RECORDS)
    packed, padded = data.batches(range(RECORDS)), [one_document_a_row(data)]
    useful = sum(int((batch.documents >= 0).sum()) for batch in packed)

    def step(packing: bool, chunks: bool, frozen: bool) -> Callable[[], tuple[float, Tensor]]:
        def work() -> tuple[float, Tensor]:
            losses, batches = [], packed if packing else padded
            with contextlib.ExitStack() as ways:
                if not chunks:
                    ways.enter_context(replaced(run, "loss", partial(table_of_logits, model)))
                if not frozen:
                    ways.enter_context(whole_tower(model))
                taken = seconds(model.device, lambda: losses.append(run.update(batches)["loss"]))
            return useful / taken, torch.tensor(losses).double()

        return work

    steps = [
        ("padded rows, logits of all positions, all blocks of the tower with gradients", step(False, False, False)),
        ("packing", step(True, False, False)),
        ("loss in chunks, where labels are", step(False, True, False)),
        ("the tower frozen, without its last block", step(False, False, True)),
        ("all", step(True, True, True)),
    ]
    return "stage 2 step", "useful tokens/s", steps


def one_document_a_row(data: Drawn) -> Batch:
    """The records as rows that are padded to the longest."""
    N, limit = data.config.vision.num_patches, data.config.max_length
    rows = [[document] for group in data.groups for document in documents(group, N, limit)]
    names = {name for (document,) in rows for name in document.images}
    return collate(rows, N, {name: data.load(name) for name in names}.__getitem__)


def table_of_logits(model: Llava, batch: Batch) -> Tensor:
    """The loss as usual: logits of all positions in one table, those without a label among them."""
    batch = batch.to(model.device)
    with torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
        x = model.embed(batch.token_ids, batch.patches, batch.pixels)
        mask = llava.Mask(documents=batch.documents, branches=batch.branches)
        logits = model.language.lm_head(model.language.hidden(x, batch.positions, mask))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten(), reduction="sum")


@contextlib.contextmanager
def whole_tower(model: Llava) -> Iterator[None]:
    """All blocks of the tower run, and backward goes through those that the features come from. The optimizer does not
    know them: their gradients are dropped."""
    tower, forward = model.vision, model.vision.forward

    def every_block(pixels: Tensor, layer: int) -> Tensor:
        features = tower.hidden_state(pixels, layer)
        B, T, _ = features.shape
        attend = attention.attention(attention.Mask(causal=False), B, T, T, pixels.device)
        for block in tower.layers[range(len(tower.layers) + 1)[layer] :]:
            block(features, attend)
        return features[:, 1:]

    tower.requires_grad_(True)
    tower.forward = every_block
    try:
        yield
    finally:
        tower.forward = forward
        tower.requires_grad_(False)
        tower.zero_grad()
