"""What each stage trains (LLaVA section 4.2), and with which settings (section 5; templates as in the official code).

    stage 1  feature alignment pre-training: the projector alone, captions, no conversation
    stage 2  visual instruction tuning: projector and language model, conversations

The vision tower is frozen in both.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nanollava.llava import Llava

PARTS = ("vision", "projector", "language")


@dataclass(frozen=True)
class Stage:
    name: str
    trained: tuple[str, ...]
    template: str  # of the training records
    lr: float
    batch_size: int
    epochs: int


STAGES = {
    "stage1": Stage("stage1", ("projector",), "plain", lr=2e-3, batch_size=128, epochs=1),
    "stage2": Stage("stage2", ("projector", "language"), "vicuna_v1", lr=2e-5, batch_size=32, epochs=3),
}


def freeze(model: Llava, stage: Stage) -> None:
    """Only the parts that the stage trains keep gradients."""
    for part in PARTS:
        getattr(model, part).requires_grad_(part in stage.trained)


def precision(part: str, stage: Stage, optimizer: str, device: str | torch.device, lora: bool) -> torch.dtype:
    """What the weights of a part are kept in: bfloat16 where they are only read, on CUDA, whose products take it, and
    everywhere for the memory-light optimizer; float32 otherwise. Under adapters the language model is only read."""
    learns = part in stage.trained and not (lora and part == "language")
    frozen = torch.device(device).type == "cuda" and not learns
    return torch.bfloat16 if frozen or optimizer == "light" else torch.float32


def set_precision(model: Llava, stage: Stage, optimizer: str, lora: bool, device: torch.device) -> None:
    for part in PARTS:
        getattr(model, part).to(precision(part, stage, optimizer, device, lora))


def parameter_table(model: Llava) -> str:
    """Part, parameters, trainable parameters: one line each, and their sum."""
    rows = [(part, *count(getattr(model, part))) for part in PARTS]
    rows.append(("all", sum(r[1] for r in rows), sum(r[2] for r in rows)))
    lines = [f"{name:<10} {total:>15,} {trained:>15,}" for name, total, trained in rows]
    return "\n".join([f"{'part':<10} {'parameters':>15} {'trained':>15}", *lines])


def count(module: nn.Module) -> tuple[int, int]:
    """(parameters, those with gradients) of a module."""
    sizes = [(p.numel(), p.numel() * p.requires_grad) for p in module.parameters()]
    return sum(a for a, _ in sizes), sum(b for _, b in sizes)
