"""Optimizers and the learning-rate schedule.

AdamW is the paper's; light.py is the same in less memory. Muon is an option for training from nothing (the miniature's
tower and language model): it takes the momentum of each hidden matrix to the nearest orthogonal one, so that all its
directions learn at the same rate.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nanollava.train.light import Light


def warmup_cosine(step: int, steps: int, warmup: float = 0.03) -> float:
    """Share of the full learning rate at ``step`` of ``steps``: linear over the first ``warmup``, then cosine to 0.
    As in transformers, the very first step has rate 0."""
    first = min(math.ceil(steps * warmup), steps - 1)  # a single step is not lost to warming up
    if step < first:
        return step / max(1, first)
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


def orthogonalise(matrices: Tensor, rounds: int = 5) -> Tensor:
    """(b, m, n) -> the same with all singular values near one, by Newton-Schulz iteration (Jordan et al., 2024, whose
    coefficients reach about 0.7 to 1.2 in few rounds and stay there)."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()  # bfloat16 products are slow on a CPU
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, with Nesterov's look ahead. The step has the size of a typical AdamW step, so that
    learning rates carry over. torch.optim.Muon computes in bfloat16 and one matrix at a time: slow on a CPU."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                momenta = torch.stack([self.look_ahead(p, group["momentum"]) for p in params]).flatten(2)  # (b, m, n)
                directions = orthogonalise(momenta).view(-1, *shape)
                # entries of about 0.2 lr, as AdamW's steps have (Liu et al., 2025, Muon is scalable for LLM training)
                scale = group["lr"] * 0.2 * max(momenta.shape[1:]) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(directions.unbind()), alpha=-scale)

    def look_ahead(self, p: nn.Parameter, momentum: float) -> Tensor:
        """The gradient's running mean, and from there one step further along the gradient (Nesterov)."""
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(state["momentum"], momentum)


def make_optimizers(
    parts: list[tuple[nn.Module, float]],
    kind: str = "adamw",
    weight_decay: float = 0.0,
    clip: float = 1.0,
    seed: int = 0,
) -> list[torch.optim.Optimizer]:
    """Optimizers for the trainable parameters of (module, learning rate) pairs. "muon" gives the hidden matrices to
    Muon and the rest (embeddings, head, norms, biases) to AdamW. "light" (light.py) clips, and rounds by that seed."""
    matrices, rest = [], []
    for module, lr in parts:
        hidden = {id(p) for name, p in module.named_parameters() if kind == "muon" and is_hidden(name, p)}
        params = [p for p in module.parameters() if p.requires_grad]
        matrices.append({"params": [p for p in params if id(p) in hidden], "lr": lr, "full_lr": lr})
        rest.append({"params": [p for p in params if id(p) not in hidden], "lr": lr, "full_lr": lr})
    if kind == "light":
        return [Light(rest, clip, weight_decay, seed)]
    adamw = torch.optim.AdamW(rest, weight_decay=weight_decay, betas=(0.9, 0.999), eps=1e-8)
    return [adamw, Muon(matrices, lr=0.0, weight_decay=weight_decay)] if kind == "muon" else [adamw]


def is_hidden(name: str, p: nn.Parameter) -> bool:
    """Matrices between hidden layers, and the one that reads patches."""
    return (p.ndim == 2 and "embed" not in name and "head" not in name) or "patch_embedding" in name


def set_learning_rate(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Give every parameter group its ``share`` of its full rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["full_lr"]
