"""The schedule at values worked by hand; the orthogonalised step against the singular value decomposition."""

import copy
import itertools
import math

import pytest
import torch

from nanollava.train.optim import Muon, orthogonalise, warmup_cosine

# ---------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    ("step", "share"),
    [
        (0, 0.0),
        (1, 1 / 3),
        (2, 2 / 3),
        (3, 1.0),  # 3% of 100 steps: the full rate
        (3 + 97 / 4, 0.5 + math.sqrt(0.5) / 2),
        (3 + 97 / 2, 0.5),
        (100, 0.0),
    ],
)
def test_warmup_then_cosine(step, share):
    assert warmup_cosine(step, 100) == pytest.approx(share, abs=1e-12)


def test_the_warmup_is_rounded_up_and_the_rate_falls_afterwards():
    """34 steps: 3% is 1.02, so two of them."""
    rates = [warmup_cosine(step, 34) for step in range(34)]
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[2:])) and rates[-1] > 0


def test_no_warmup_and_a_single_step_are_no_special_cases():
    assert warmup_cosine(0, 10, warmup=0.0) == 1.0
    assert warmup_cosine(5, 10, warmup=0.0) == pytest.approx(0.5)
    assert warmup_cosine(0, 1) == 1.0  # or a single step would train nothing
    assert [warmup_cosine(step, 2) for step in range(2)] == [0.0, 1.0]


# ---------------------------------------------------------------- orthogonalise


def matrix(m: int, n: int, singular: torch.Tensor, seed: int = 0):
    """U diag(singular) V^T with random orthonormal U (m, r), V (n, r)."""
    draw = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, len(singular), generator=draw)).Q
    v = torch.linalg.qr(torch.randn(n, len(singular), generator=draw)).Q
    return u, v, u @ singular.diag() @ v.T


shapes = pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)], ids=["square", "tall", "wide"])


@shapes
def test_singular_values_come_near_one_and_singular_vectors_stay(shape):
    """Down to a hundredth of the largest: smaller ones need more rounds."""
    singular = torch.logspace(0, -2, min(shape)) * 3
    u, v, x = matrix(*shape, singular)
    found = orthogonalise(x[None])[0]
    values = torch.linalg.svdvals(found)
    assert found.shape == shape and values.min() > 0.65 and values.max() < 1.25
    inside = u.T @ found @ v  # diagonal where the vectors are the same
    torch.testing.assert_close(inside, inside.diagonal().diag(), rtol=0, atol=1e-4)
    assert inside.diagonal().min() > 0.65  # and none has changed its sign
    torch.testing.assert_close(u @ inside @ v.T, found, rtol=0, atol=1e-4)  # nothing outside them


@shapes
def test_each_singular_value_goes_its_own_way_through_the_polynomial(shape):
    """The iteration on matrices is the polynomial on singular values, here in float64 and one by one."""
    singular = torch.linspace(5, 0.5, min(shape))
    u, v, x = matrix(*shape, singular)
    s = singular.double() / singular.double().norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    inside = (u.T @ orthogonalise(x[None])[0] @ v).diagonal()
    torch.testing.assert_close(inside.double(), s, rtol=0, atol=1e-4)


def test_the_size_of_a_matrix_does_not_matter_and_zero_stays_zero():
    _, _, x = matrix(8, 12, torch.linspace(1, 0.2, 8))
    torch.testing.assert_close(orthogonalise(x[None] * 100), orthogonalise(x[None]), rtol=1e-3, atol=1e-4)
    assert orthogonalise(torch.zeros(1, 8, 12)).abs().max() == 0


def test_matrices_of_a_stack_are_independent():
    stack = torch.stack([matrix(8, 12, torch.linspace(1, 0.2, 8), seed)[2] for seed in range(3)])
    alone = torch.cat([orthogonalise(x[None]) for x in stack])
    torch.testing.assert_close(orthogonalise(stack), alone, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- Muon


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


@shapes
def test_the_first_step_is_the_orthogonalised_gradient_at_the_size_of_adamws(shape):
    p = parameter(*shape)
    before = p.detach().clone()
    _, _, gradient = matrix(*shape, torch.linspace(1, 0.2, min(shape)))
    p.grad = gradient.clone()
    Muon([p], lr=0.1).step()
    step = (before - p.detach()) / 0.1
    # momentum and look-ahead scale the first gradient; its direction is the gradient's
    expected = 0.2 * math.sqrt(max(shape)) * orthogonalise(gradient[None])[0]
    torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-3)
    assert 0.1 < step.square().mean().sqrt() < 0.3  # AdamW's steps measure 0.2 to 0.4 of its rate


def test_momentum_and_look_ahead_follow_their_definition():
    """Two gradients a and b: the momentum is m = 0.95 m + 0.05 g, the direction 0.95 m + 0.05 g once more."""
    p = parameter(8, 12)
    optimizer = Muon([p], lr=0.01)
    a, b = (matrix(8, 12, torch.linspace(1, 0.2, 8), seed)[2] for seed in (1, 2))
    p.grad = a
    optimizer.step()
    before = p.detach().clone()
    p.grad = b
    optimizer.step()
    direction = 0.95 * (0.95 * 0.05 * a + 0.05 * b) + 0.05 * b
    expected = 0.01 * 0.2 * math.sqrt(12) * orthogonalise(direction[None])[0]
    torch.testing.assert_close(before - p.detach(), expected, rtol=1e-3, atol=1e-5)


@shapes
def test_it_reduces_a_quadratic(shape):
    """The squared distance to a target. The momentum lags about 20 steps behind, so the rate has to fall to arrive."""
    p = parameter(*shape)
    target = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    losses = []
    optimizer = Muon([p], lr=0.1)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 * warmup_cosine(step, 200)
        optimizer.zero_grad()
        loss = (p - target).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_matrices_of_different_shapes_convolutions_and_missing_gradients_step_together():
    wide, tall, kernel, idle = parameter(4, 6), parameter(6, 4), parameter(8, 3, 2, 2), parameter(4, 6)
    before = [p.detach().clone() for p in (wide, tall, kernel, idle)]
    for p in (wide, tall, kernel):
        p.grad = torch.ones_like(p)
    Muon([wide, tall, kernel, idle], lr=0.1).step()
    assert torch.equal(idle, before[3])
    for p, old in zip((wide, tall, kernel), before, strict=False):
        # all ones is one singular value: the step is the same everywhere, downhill
        step = (old - p.detach()).flatten(1)
        assert step.min() > 0
        torch.testing.assert_close(step, step.mean().expand_as(step), rtol=1e-3, atol=1e-6)


def test_weight_decay_shrinks_before_the_step():
    p, q = parameter(4, 6), parameter(4, 6)
    p.grad, q.grad = torch.ones(4, 6), torch.ones(4, 6)
    before = p.detach().clone()
    Muon([p], lr=0.1).step()
    Muon([q], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(q.detach(), p.detach() - 0.05 * before)


def test_its_state_can_be_saved_and_goes_on_the_same():
    p = parameter(4, 6)
    optimizer = Muon([p], lr=0.1)
    p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    q = torch.nn.Parameter(p.detach().clone())
    resumed = Muon([q], lr=0.7)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    q.grad = p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    optimizer.step()
    resumed.step()
    assert torch.equal(p, q)
