"""The memory-light AdamW: rounding by chance against its definition, steps against PyTorch's AdamW in float64, and what
stepping inside backward must not change."""

import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import utils as dynamo

from nanollava.train import light
from nanollava.train.light import Light, random_bits, round_by_chance

MANY = 100_000


def parameter(*values: float, count: int = 1) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values).repeat(count).bfloat16())


def optimizer(*params: nn.Parameter, lr: float = 0.01, clip: float = 1e9, **settings: float) -> Light:
    return Light([{"params": list(params), "lr": lr}], clip, **settings)


def step(adam: Light, *gradients: tuple[nn.Parameter, Tensor]) -> float:
    """One step whose gradients are these."""
    sum((p * g).sum() for p, g in gradients).backward()
    norm = adam.finish()
    adam.step()
    return norm


# ---------------------------------------------------------------- several processes


def test_what_is_idle_keeps_its_numbers_and_moments_whatever_backward_gives_it():
    """As the zeros that a process without images has for the projector: momentum would move it."""
    p, other = parameter(1.0), parameter(1.0)
    adam = optimizer(p, other)
    step(adam, (p, torch.ones(1)), (other, torch.ones(1)))
    state, kept = adam.state[p], p.detach().clone()
    moments = state["mean"].clone(), state["square"].clone()
    adam.idle = frozenset({p})
    step(adam, (p, torch.zeros(1)), (other, torch.zeros(1)))
    assert torch.equal(p, kept) and p.grad is None and state["steps"] == 1
    assert torch.equal(state["mean"], moments[0]) and torch.equal(state["square"], moments[1])
    assert adam.state[other]["steps"] == 2 and not torch.equal(adam.state[other]["mean"], moments[0])


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("x", [1.001, -1.001, 0.1, 3e-30, 1.9999, -123.4])
def test_a_number_becomes_one_of_its_neighbours_and_stays_itself_in_the_mean(x):
    rounded = round_by_chance(torch.full((MANY,), x), random_bits(MANY, 1, "cpu")).float()
    exact, bit = torch.tensor(x), 2.0 ** (math.frexp(x)[1] - 8)  # bfloat16 keeps 8 bits
    values = sorted(set(rounded.tolist()))
    assert len(values) == 2 and values[1] - values[0] == bit and values[0] < exact < values[1]
    assert abs(rounded.double().mean() - exact.double()) < 4 * 0.5 * bit / math.sqrt(MANY)  # four standard errors


def test_what_bfloat16_can_hold_stays_whatever_the_bits():
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**127, math.inf, -math.inf])
    for bits in (0, 0xFFFF, -1):
        assert torch.equal(round_by_chance(x, torch.full((7,), bits, dtype=torch.int32)), x.bfloat16())
    assert round_by_chance(torch.tensor([math.nan]), torch.tensor([-1], dtype=torch.int32)).isnan().all()


def test_bits_are_even_and_independent():
    """Each of the 32 is set half the time; no two of them, no two positions, no two keys have to do with each other."""
    draws = [random_bits(MANY, key, "cpu") for key in (1, 10**6, 2**31 - 5)]
    columns = torch.stack([(x[i : i + MANY // 2] >> k & 1) for x in draws for i in (0, 1) for k in range(32)])
    correlation = torch.corrcoef(columns.double()) - torch.eye(len(columns))
    assert (columns.double().mean(dim=1) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(MANY // 2)
    assert correlation.abs().max() < 5.5 / math.sqrt(MANY // 2)
    assert torch.equal(draws[0], random_bits(MANY, 1, "cpu"))


# ---------------------------------------------------------------- steps


def test_steps_are_adamws_in_the_mean():
    """Many copies of a few weights with the same gradients: their mean follows AdamW in float64, one of them does not.
    Its last bit at 1 is 0.0078, a step 0.001."""
    starts, steps = (1.0, -0.5, 0.02, 2.0, 0.0), 60
    p, exact = parameter(*starts, count=4000), nn.Parameter(torch.tensor(starts).bfloat16().double())
    ours, theirs = optimizer(p, lr=1e-3, weight_decay=0.1), torch.optim.AdamW([exact], lr=1e-3, weight_decay=0.1)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        g = (torch.randn(len(starts), generator=draw) + 0.5).bfloat16()
        step(ours, (p, g.repeat(4000)))
        exact.grad = g.double()
        theirs.step()
    found = p.detach().double().view(4000, -1)
    state, other = ours.state[p], theirs.state[exact]
    assert ((found - exact).abs().max(dim=0).values[[0, 1, 3]] > 5e-3).all()
    moved = (exact - torch.tensor(starts, dtype=torch.float64)).abs().max().item()
    assert moved > 0.015
    torch.testing.assert_close(found.mean(dim=0), exact.data, rtol=0, atol=0.03 * moved)
    squares = state["square"].double().view(4000, -1).mean(dim=0)
    torch.testing.assert_close(squares, other["exp_avg_sq"], rtol=0.01, atol=0)
    means = state["mean"].double().view(4000, -1)[0]
    torch.testing.assert_close(means, other["exp_avg"], rtol=0.03, atol=0.01)


def test_the_mean_square_is_neither_stuck_nor_lost():
    """It moves by a thousandth of itself, less than half of bfloat16's last bit; float16 would hold none of 1e-14."""
    p = parameter(1.0, count=2000)
    adam = optimizer(p, lr=0.0)
    for _ in range(400):
        step(adam, (p, torch.full((2000,), 1e-7)))
    found = adam.state[p]["square"].double().mean().item()
    assert found == pytest.approx(1e-14 * (1 - 0.999**400), rel=0.02)


def test_steps_far_below_the_last_bit_move_the_mean():
    """1000 steps of 1e-5 where the last bit is 0.0078: rounded to the nearest, none would move anything."""
    p = parameter(1.0, count=20_000)
    adam = optimizer(p, lr=1e-5)
    for _ in range(100):
        step(adam, (p, torch.ones(20_000)))
    noise = math.sqrt(100 * 1e-5 * 0.0039 / 20_000)  # below 1 the last bit is 0.0039
    assert abs(1 - p.detach().double().mean().item() - 100 * 1e-5) < 4 * noise


def test_no_two_parameters_and_no_two_steps_round_alike():
    p, q = parameter(1.001, count=1000), parameter(1.001, count=1000)
    adam, seen = optimizer(p, q, lr=1e-4), []
    for _ in range(2):
        step(adam, (p, torch.ones(1000)), (q, torch.ones(1000)))
        seen += [adam.state[p]["square"].clone(), adam.state[q]["square"].clone()]
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[2] > seen[2].float().mean(), seen[0] > seen[0].float().mean())


def test_weight_and_mean_square_are_rounded_independently():
    p = parameter(1.0, count=20_000)
    adam = optimizer(p, lr=1e-3)
    step(adam, (p, torch.ones(20_000)))
    up = torch.stack([x.detach().double() for x in (p, adam.state[p]["square"])])
    assert up.std(dim=1).min() > 0 and torch.corrcoef(up)[0, 1].abs() < 5 / math.sqrt(20_000)


def test_state_takes_four_bytes_for_a_parameter_and_the_weight_two():
    p = parameter(1.0, count=1000)
    adam = optimizer(p)
    step(adam, (p, torch.ones(1000)))
    assert sum(x.nbytes for x in adam.state[p].values() if isinstance(x, Tensor)) == 4 * 1000
    assert p.nbytes == 2 * 1000


def test_a_parameter_is_updated_to_its_last_number_in_pieces(monkeypatch):
    """Five of 7 numbers; weights and steps that bfloat16 can hold."""
    monkeypatch.setattr(light, "PIECE", 7)
    p = nn.Parameter(torch.arange(1.0, 31).view(5, 6).bfloat16())
    step(optimizer(p, lr=0.25), (p, torch.ones(5, 6)))
    assert torch.equal(p.detach().float(), torch.arange(1.0, 31).view(5, 6) - 0.25)


# ---------------------------------------------------------------- inside backward


class Tower(nn.Module):
    """Layers one after the other, the last of them tied to the first."""

    def __init__(self, layers: int = 6):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.layers[-1].weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x.float().square().sum()


def batch(seed: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_each_gradient_is_gone_before_the_next_one_comes(monkeypatch):
    model, alive = Tower().bfloat16(), []
    monkeypatch.setattr(
        Light, "clipped", lambda self, *_: alive.append(sum(p.grad is not None for p in self.updates)) or torch.ones(())
    )
    adam = optimizer(*model.parameters())
    model(batch(0)).backward()
    assert alive == [1] * len(list(model.parameters()))
    assert all(p.grad is None for p in model.parameters()) and len(adam.state) == len(alive)


def test_weights_that_change_inside_backward_leave_the_gradients_behind_them_as_they_were():
    """Steps of the size of the weights: whoever used a weight after its step would see another one."""
    model, expected = Tower().bfloat16(), Tower().bfloat16()
    adam = optimizer(*model.parameters(), lr=1.0)
    model(batch(0)).backward()
    expected(batch(0)).backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(adam.state[p]["mean"].float(), 0.1 * q.grad.float(), rtol=2**-7, atol=1e-6)


def test_gradients_of_several_micro_batches_add_up_before_the_step():
    p, q = parameter(1.0, 2.0, 3.0), parameter(1.0, 2.0, 3.0)
    ours, theirs = optimizer(p), optimizer(q)
    a, b = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([2.0, 0.5, 4.0])
    ours.due = False
    (p * a).sum().backward()
    assert torch.equal(p.detach(), q.detach()) and not ours.state
    ours.due = True
    assert step(ours, (p, b)) == step(theirs, (q, a + b)) == pytest.approx((a + b).norm().item())
    assert torch.equal(p.detach(), q.detach()) and p.grad is None


def test_what_the_last_micro_batch_does_not_reach_is_updated_too():
    """An image in the first, text alone in the last: the projector's gradient is of the first."""
    p, q = parameter(1.0), parameter(1.0)
    adam = optimizer(p, q, lr=0.25)
    adam.due = False
    (3 * p).sum().backward()
    adam.due = True
    assert step(adam, (q, torch.tensor([4.0]))) == 5.0
    assert p.item() == q.item() == 0.75 and p.grad is None


def test_what_has_no_gradient_stays():
    p, q = parameter(1.0), parameter(1.0)
    adam = optimizer(p, q, weight_decay=0.5)
    step(adam, (p, torch.ones(1)))
    assert q.item() == 1.0 and q not in adam.state


def test_no_gradient_is_longer_than_clip_and_a_norm_that_stays_high_is_clipped_exactly(monkeypatch):
    """First (3, 4): the first of them, alone, is cut to 1, the second by the norm of both. Then the norm is known."""
    scales, clipped = [], Light.clipped
    monkeypatch.setattr(Light, "clipped", lambda *a: scales.append(clipped(*a)) or scales[-1])
    p, q = parameter(1.0), parameter(1.0)
    adam = optimizer(p, q, clip=1.0)
    for _ in range(2):
        assert step(adam, (p, torch.tensor([3.0])), (q, torch.tensor([4.0]))) == 5.0
    # twice a fifth of the gradient, but for the larger share of the one that came first
    assert min(adam.state[x]["mean"].item() / g for x, g in ((p, 3), (q, 4))) == pytest.approx(0.19 / 5, rel=1e-2)
    first = sorted(s.item() for s in scales[:2])  # in the order of backward, which is not ours to say
    assert first in ([pytest.approx(1 / 5), pytest.approx(1 / 3)], [pytest.approx(1 / 5), pytest.approx(1 / 4)])
    assert [s.item() for s in scales[2:]] == pytest.approx([1 / 5, 1 / 5])
    assert step(adam, (p, torch.tensor([0.03])), (q, torch.tensor([0.04]))) == pytest.approx(0.05, rel=1e-2)
    step(adam, (p, torch.tensor([0.03])))
    assert [s.item() for s in scales[4:]] == pytest.approx([1 / 5, 1 / 5, 1.0])


def test_an_infinite_gradient_shows_in_the_norm():
    p = parameter(1.0, 2.0)
    assert math.isnan(step(optimizer(p), (p, torch.tensor([math.nan, 1.0]))))
    q = parameter(1.0, 2.0)
    assert math.isinf(step(optimizer(q), (q, torch.tensor([math.inf, 1.0]))))


def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    def train(model: Tower, adam: Light, seeds: range) -> None:
        for seed in seeds:
            model(batch(seed)).backward()
            adam.finish()
            adam.step()

    make = lambda model: optimizer(*model.parameters(), clip=0.5, weight_decay=0.1, seed=3)  # noqa: E731
    model = Tower().bfloat16()
    adam = make(model)
    train(model, adam, range(4))
    torch.save(adam.state_dict(), tmp_path / "state.pt")
    other = Tower().bfloat16()
    other.load_state_dict(model.state_dict())
    resumed = make(other)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(model, adam, range(4, 8))
    train(other, resumed, range(4, 8))
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_another_seed_rounds_otherwise():
    found = []
    for seed in (0, 0, 1):
        p = parameter(1.001, count=1000)
        step(optimizer(p, lr=1e-3, seed=seed), (p, torch.ones(1000)))
        found.append(p.detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_compiled_once_it_draws_the_same_bits_at_all_sizes_rates_and_steps(monkeypatch):
    """A compiler that needs no C++; sums may be rounded otherwise, so weights may differ by their last bit, rarely."""
    monkeypatch.setattr(
        light, "compiled", lambda f: torch.compile(f, dynamic=True, backend="aot_eager", fullgraph=True)
    )
    torch._dynamo.reset()
    dynamo.counters.clear()
    plain, fused = ([parameter(0.1, -2.0, count=n) for n in (40, 300, 70)] for _ in range(2))
    ours, theirs = optimizer(*plain), optimizer(*fused)
    theirs.compile()
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    for rate in (1e-3, 3e-3, 2e-3):
        gradients = [draw(p.shape).bfloat16() for p in plain]
        for adam, params in ((ours, plain), (theirs, fused)):
            adam.param_groups[0]["lr"] = rate
            step(adam, *zip(params, gradients, strict=True))
    assert dynamo.counters["stats"]["unique_graphs"] == 1
    for p, q in zip(plain, fused, strict=True):
        assert (p != q).float().mean() < 0.01
        torch.testing.assert_close(p, q, rtol=2**-7, atol=0)
