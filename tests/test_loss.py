"""The loss in chunks against PyTorch's cross-entropy on whole logits; how much of them exists at a time."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanollava.llama import Llama, LlamaConfig
from nanollava.loss import summed_cross_entropy

n, D, V = 21, 8, 50
CHUNKS = pytest.mark.parametrize("rows", [1, 7, 8, 20, 21, 1000])  # 7 divides 21, 8 and 20 do not


def inputs(dtype: torch.dtype, count: int = n) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, D, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    head = torch.randn(V, D, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, head, torch.randint(V, (count,), generator=draw)


def plain(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(hidden @ head.T, targets, reduction="sum")


@CHUNKS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradients_are_those_of_whole_logits(dtype, rows):
    hidden, head, targets = inputs(dtype)
    found, expected = summed_cross_entropy(hidden, head, targets, rows), plain(hidden, head, targets)
    assert found.dtype == dtype and found.shape == ()
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(loss / 3, (hidden, head)) for loss in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_very_large_logits_overflow_nothing():
    hidden, head, targets = inputs(torch.float32)
    loss = summed_cross_entropy(hidden * 1e4, head, targets, 8)
    torch.testing.assert_close(loss, plain(hidden * 1e4, head, targets))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, head)))


@CHUNKS
def test_bfloat16_weights_sum_in_float32(rows):
    """Against float64 on the same numbers: what is lost is the rounding of products and results to 8 bits, not the
    sum's: n times log V, about 80, is wrong by far less than bfloat16's step there, 0.5."""
    hidden, head, targets = inputs(torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    found, expected = summed_cross_entropy(hidden, head, targets, rows), plain(*exact, targets)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=1e-3)
    ours, theirs = (torch.autograd.grad(loss, xs) for loss, xs in ((found, (hidden, head)), (expected, exact)))
    assert [g.dtype for g in ours] == [torch.bfloat16] * 2
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).norm() < 2**-7 * b.norm()


def test_autocast_takes_bfloat16_products_and_gives_float32_gradients():
    hidden, head, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = summed_cross_entropy(hidden.bfloat16(), head, targets, 8)
        other = summed_cross_entropy(hidden.bfloat16(), head.bfloat16(), targets, 8)
    assert loss.item() == other.item() and loss.item() != plain(hidden, head, targets).item()
    d_hidden, d_head = torch.autograd.grad(loss, (hidden, head))
    expected = torch.autograd.grad(plain(hidden, head, targets), (hidden, head))
    assert d_head.dtype == d_hidden.dtype == torch.float32
    torch.testing.assert_close((d_hidden, d_head), expected, rtol=0, atol=0.1)  # entries up to 10, of 8 bits


class Watch(TorchDispatchMode):
    """Notes how many numbers the largest tensor made inside has, and how many matrix products were taken."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        made = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *(x.numel() for x in made)])
        return out


def test_logits_of_a_few_positions_are_the_largest_tensor():
    """300 positions, 7 at a time: never 300 times V numbers, nor half of them; the plain way makes just these."""
    hidden, head, targets = inputs(torch.float32, 300)
    with Watch() as ours:
        summed_cross_entropy(hidden, head, targets, 7).backward()
    with Watch() as theirs:
        plain(hidden, head, targets).backward()
    assert ours.largest == max(V * D, 7 * V, 300 * D) and theirs.largest == 300 * V


def test_only_the_gradients_that_are_needed_are_computed():
    """One product for the logits of each chunk, one for each gradient; the three chunks recompute nothing."""
    hidden, head, targets = inputs(torch.float32)

    def products(h: torch.Tensor, w: torch.Tensor, grad: bool = True) -> int:
        with Watch() as watch, torch.set_grad_enabled(grad):
            loss = summed_cross_entropy(h, w, targets, 7)
            if loss.requires_grad:
                loss.backward()
        return watch.products

    assert products(hidden, head) == 9
    assert products(hidden, head.detach()) == 6  # stage 1: the head is frozen
    assert products(hidden.detach(), head) == 6
    assert products(hidden.detach(), head.detach()) == 3
    assert products(hidden, head, grad=False) == 3  # validation


def test_a_frozen_head_changes_no_other_gradient():
    hidden, head, targets = inputs(torch.float64)
    expected = torch.autograd.grad(plain(hidden, head, targets), hidden)
    found = torch.autograd.grad(summed_cross_entropy(hidden, head.detach(), targets, 8), hidden)
    torch.testing.assert_close(found, expected)


def test_a_tied_head_and_embedding_get_the_sum_of_both_gradients():
    torch.manual_seed(0)
    ours = Llama(LlamaConfig(V, 16, 24, 2, 2, tie_word_embeddings=True)).double()
    theirs = copy.deepcopy(ours)
    ids = torch.randint(V, (2, 9))
    hidden = ours.hidden(ours.embed_tokens(ids[:, :-1])).flatten(0, 1)
    summed_cross_entropy(hidden, ours.lm_head.weight, ids[:, 1:].flatten(), 5).backward()
    F.cross_entropy(theirs(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    assert theirs.lm_head.weight is theirs.embed_tokens.weight
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_no_targets_are_no_loss():
    hidden, head, targets = inputs(torch.float32, 0)
    loss = summed_cross_entropy(hidden, head, targets)
    loss.backward()
    assert loss.item() == 0 and not head.grad.any() and hidden.grad.shape == (0, D)


def test_a_second_backward_is_refused_not_wrong():
    hidden, head, targets = inputs(torch.float32)
    loss = summed_cross_entropy(hidden, head, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_infinite_hidden_state_shows():
    hidden, head, targets = inputs(torch.float32)
    assert math.isnan(summed_cross_entropy(hidden * math.inf, head, targets).item())
