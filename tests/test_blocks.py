"""Recomputed blocks: the gradients of kept activations, bit for bit, and next to none of them kept."""

import copy
import functools

import pytest
import torch
from torch import Tensor
from torch._dynamo import utils as dynamo
from torch._inductor.exc import InductorError

from nanollava.attention import Mask
from nanollava.llama import Llama, LlamaConfig
from nanollava.train.blocks import prepare_blocks

B, T, D, LAYERS = 2, 24, 32, 3


@pytest.fixture
def decoder() -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig(50, D, 48, LAYERS, 2, 1))


def run(model: Llama, grad: bool = True) -> tuple[Tensor, Tensor]:
    """Hidden states of packed rows, and the embeddings they come from."""
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(1), requires_grad=grad)
    documents = (torch.arange(T) >= 10).long().expand(B, T)
    return model.hidden(x, mask=Mask(documents=documents, branches=documents)), x


def gradients(model: Llama) -> list[Tensor]:
    hidden, x = run(model)
    used = [p for name, p in model.named_parameters() if not name.startswith(("embed", "lm_head"))]
    return list(torch.autograd.grad(hidden.sin().sum(), [x, *used]))


def kept(model: Llama) -> int:
    """How many numbers a forward pass keeps for backward, weights and whatever is seen twice not counted."""
    storages = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        held.append(tensor)  # or its address might be given to another
        return tensor

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for address, size in storages.items() if address not in weights)


def test_gradients_are_the_same_bit_for_bit(decoder):
    other = copy.deepcopy(decoder)
    prepare_blocks(other, recompute=True, compiled=False)
    assert torch.equal(run(decoder)[0], run(other)[0])
    assert all(map(torch.equal, gradients(decoder), gradients(other)))


def test_frozen_blocks_pass_the_gradient_on_to_what_is_in_front_of_them(decoder):
    """Stage 1: the projector learns, through a language model that does not."""
    other = copy.deepcopy(decoder).requires_grad_(False)
    prepare_blocks(other, recompute=True, compiled=False)
    found, expected = (torch.autograd.grad(h.sin().sum(), x)[0] for h, x in (run(other), run(decoder)))
    assert torch.equal(found, expected) and expected.any()


def test_only_the_inputs_of_blocks_are_kept(decoder):
    """One input (B, T, D) for each block, and what the last norm keeps: x in float32 and normalised, a sum per row."""
    plain = kept(decoder)
    prepare_blocks(decoder, recompute=True, compiled=False)
    assert (LAYERS + 1) * B * T * D <= kept(decoder) <= (LAYERS + 3) * B * T * D
    assert plain > 3 * kept(decoder)


def test_names_and_weights_stay(decoder):
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    prepare_blocks(decoder, recompute=True, compiled=False)
    after = decoder.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_without_gradients_a_block_runs_once(decoder):
    calls = []
    for block in decoder.layers:
        block.register_forward_hook(lambda *_: calls.append(1))
        block.mlp.register_forward_hook(lambda *_: calls.append(1))
    prepare_blocks(decoder, recompute=True, compiled=False)
    with torch.no_grad():
        run(decoder, grad=False)
    assert len(calls) == 2 * LAYERS


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_share_one_compilation_and_give_the_same_gradients(recompute, decoder, monkeypatch):
    """A compiler that needs no C++: traced and differentiated ahead of time, then run by PyTorch."""
    expected = gradients(decoder)
    plain = kept(decoder)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    dynamo.counters.clear()
    prepare_blocks(decoder, recompute=recompute, compiled=True)
    torch.testing.assert_close(gradients(decoder), expected)
    assert dynamo.counters["stats"]["unique_graphs"] == 1
    assert (kept(decoder) < plain / 3) == recompute


def test_blocks_that_cannot_be_compiled_after_all_are_run_as_before(decoder, monkeypatch, capsys):
    def backend(*_: object) -> None:
        raise InductorError(OSError(28, "No space left on device"), None)

    expected = gradients(decoder)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    prepare_blocks(decoder, recompute=True, compiled=True)
    assert all(map(torch.equal, gradients(decoder), expected))
    assert capsys.readouterr().err.count("cannot compile") == 1
