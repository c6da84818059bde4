"""AdamW (Loshchilov and Hutter, 2019, algorithm 2) in 6 bytes for a parameter in place of 16.

    m <- m + (1 - b1) (g - m),   v <- v + (1 - b2) (g^2 - v)
    p <- (1 - rate * decay) p - rate * m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    bytes for a parameter    AdamW    here
    p, the weight                4       2   bfloat16, rounded by chance
    g, its gradient              4       0   used inside backward and dropped; 2 where a step has several micro-batches
    m, mean gradient             4       2   bfloat16
    v, mean square               4       2   bfloat16, whose range is float32's, so small ones do not vanish; by chance

Why by chance: bfloat16 keeps 8 bits. A step moves p by less than its last bit, and v by a thousandth of itself: rounded
to the nearest, neither would ever move. 1 + 1/512 lies a quarter of the way from 1 to the next bfloat16, 1 + 1/128: it
becomes the upper one with probability 1/4, so both are right in the mean. The price is noise: p wanders by about
sqrt(number of steps * size of a step * spacing). Compensated sums have none, but take two more bytes for a weight. m
moves by a tenth of its distance to g, most often more than its last bit: the nearest will do.

What stepping inside backward changes is clipping: the norm of all gradients is known only when all have been used. Each
is scaled by clip / max(norm of the last step, norm of those seen so far in this one), where that is below 1. So none
enters longer than ``clip``, and a norm that stays high is clipped as ever; of a sudden rise the first ones seen are
scaled by less than all will be in the next step.
"""

import functools
import random

import torch
from torch import Tensor, nn

from nanollava.attention import can_compile, compiled, or_plain
from nanollava.train.distributed import full, local, rank

B1, B2, EPS = 0.9, 0.999, 1e-8
PIECE = 2**24  # numbers updated at once: what is computed on the way takes memory too


class Light(torch.optim.Optimizer):
    """Updates each bfloat16 parameter as soon as backward has its gradient, which is then gone.

    For a step of several micro-batches, ``due`` is False in all backwards but the last: their gradients add up in
    bfloat16, 2 bytes more for each parameter. After the last one call ``finish``, then ``step``. What is ``idle`` has
    had no gradient in this step, whatever backward says: the projector where no process had an image gets zeros.

    Of a parameter that several processes share each updates its own part: FSDP2 runs the hooks of a parameter when its
    gradient has been summed and cut.
    """

    def __init__(self, groups: list[dict], clip: float, weight_decay: float = 0.0, seed: int = 0):
        super().__init__(groups, {"clip": clip, "weight_decay": weight_decay, "seed": seed, "norm": 0.0})
        self.due, self.idle = True, frozenset()
        self.squares = torch.zeros(())  # of the gradients seen in this step, summed
        places = [(p, i) for i, group in enumerate(self.param_groups) for p in group["params"]]
        self.updates = {p: functools.partial(self.update, i, number) for number, (p, i) in enumerate(places)}
        for p, update in self.updates.items():
            p.register_post_accumulate_grad_hook(update)
        self.kernel = adamw
        if places and places[0][0].is_cuda and can_compile("cuda"):
            self.compile()

    def compile(self) -> None:
        """One pass over memory in place of twenty."""
        self.kernel = or_plain(compiled(adamw), adamw)

    @torch.no_grad()
    def update(self, group_number: int, number: int, p: nn.Parameter) -> None:
        """One parameter's step; ``number`` tells it from all others, so that its rounding is its own."""
        if p in self.idle:
            p.grad = None
        if not self.due or p.grad is None:
            return
        group, state = self.param_groups[group_number], self.state[p]
        if not state:
            state.update(steps=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
        state["steps"] += 1
        scale = self.clipped(p.grad, group["clip"])
        flat = [local(x).reshape(-1) for x in (p, state["mean"], state["square"], p.grad)]
        p.grad = None
        for start in range(0, len(flat[0]), PIECE):
            place = rank() * p.numel() + start  # no two processes draw the same
            key = random.Random(f"{group['seed']} {state['steps']} {number} {place}").getrandbits(31)
            pieces = (x[start : start + PIECE] for x in flat)
            self.kernel(*pieces, scale, group["lr"], group["lr"] * group["weight_decay"], state["steps"], key)

    def clipped(self, gradient: Tensor, clip: float) -> Tensor:
        """What the gradient is to be multiplied by. On the device: nothing waits for its value."""
        self.squares = self.squares + full(torch.linalg.vector_norm(gradient, dtype=torch.float32)).square()
        return (clip / self.squares.sqrt().clamp(min=self.param_groups[0]["norm"])).clamp(max=1)

    def finish(self) -> float:
        """The norm of the step's gradients, after what the last micro-batch did not reach has been updated too."""
        for p, update in self.updates.items():
            if p.grad is not None:
                update(p)
        return self.squares.sqrt().item()

    def step(self, closure: None = None) -> None:
        """Nothing is left to do but to remember the norm."""
        self.param_groups[0]["norm"] = self.squares.sqrt().item()
        self.squares = torch.zeros(())


def adamw(
    p: Tensor, m: Tensor, v: Tensor, g: Tensor, scale: Tensor, rate: float, decay: float, steps: int, key: int
) -> None:
    """The equations above on flat bfloat16 tensors, in place; computed in float32, rounded once."""
    g = g.float() * scale
    mean, square = m.float().lerp(g, 1 - B1), v.float().lerp(g * g, 1 - B2)
    step = mean / (1 - B1**steps) / ((square / (1 - B2**steps)).sqrt() + EPS)
    bits = random_bits(len(p), key, p.device)
    m.copy_(mean)
    v.copy_(round_by_chance(square, bits >> 16))
    p.copy_(round_by_chance(p.float() * (1 - decay) - rate * step, bits))


def round_by_chance(x: Tensor, bits: Tensor) -> Tensor:
    """float32 -> bfloat16, to one of the two neighbours, so that the mean is x: 16 random bits, the last ones of
    ``bits`` (int32), are added to the 16 that are cut off. Infinity and NaN stay."""
    return (x.view(torch.int32) + (bits & 0xFFFF) & -0x10000).view(torch.float32).bfloat16()


def random_bits(count: int, key: int, device: torch.device) -> Tensor:
    """(count,) int32 of 32 random bits each: a hash of key + position (the last steps of MurmurHash3; Appleby, 2011).
    A function of its arguments, unlike what a generator with a state gives: a resumed run draws the same."""
    x = torch.arange(count, dtype=torch.int32, device=device) + key
    x = (x ^ (x >> 16 & 0xFFFF)) * -0x7A143595  # 0x85EBCA6B as a signed number; products wrap around
    x = (x ^ (x >> 13 & 0x7FFFF)) * -0x3D4D51CB  # 0xC2B2AE35
    return x ^ (x >> 16 & 0xFFFF)
