"""Logits become tokens: the most likely one, or one drawn by temperature, top-k and top-p (Holtzman et al., 2020).

Shapes: B rows, V vocabulary.
"""

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from nanollava.error import Error


@dataclass(frozen=True)
class Sampling:
    """How each next token is chosen. Raises Error on values that make no sense."""

    temperature: float = 0.0  # 0: always the most likely token (greedy); 1: drawn with the model's own probabilities
    top_p: float = 1.0  # draw among the most likely tokens that together reach this probability
    top_k: int = 0  # draw among this many of the most likely tokens; 0: among all
    max_new_tokens: int = 512
    seed: int | None = None  # the same seed draws the same answer again; None: another one each time

    def __post_init__(self):
        for name in ("temperature", "top_p"):
            self._require(name, self._is(name, int | float), "a number")
        for name in ("top_k", "max_new_tokens", "seed"):
            optional = name == "seed" and self.seed is None
            self._require(name, optional or self._is(name, int), "a whole number")
        self._require("temperature", 0 <= self.temperature <= sys.float_info.max, "0 (greedy) or more")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._require("top_k", self.top_k >= 0, "0 (all tokens) or more")
        self._require("max_new_tokens", self.max_new_tokens >= 1, "1 or more")
        self._require("seed", self.seed is None or 0 <= self.seed < 2**63, "0 or more, and below 2^63")

    def _is(self, name: str, kind: type) -> bool:
        """Whether a value is of that kind; True and False are no numbers."""
        return isinstance(getattr(self, name), kind) and not isinstance(getattr(self, name), bool)

    def _require(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise Error(f"{name} is {getattr(self, name)}: it must be {expected}")


GREEDY = Sampling()


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """(B, V) logits -> (B,) token ids. top_k counts before top_p, as is usual.

    Raises Error where logits are no numbers, as after an overflow in float16.
    """
    if not logits.isfinite().all():
        kind = str(logits.dtype).removeprefix("torch.")
        remedy = "choose --dtype bfloat16 or float32 (dtype=); where it is that already, the weights are damaged"
        raise Error(f"the model computes infinite numbers, or none, in {kind}: {remedy}")
    if sampling.temperature < torch.finfo(torch.float32).tiny:  # 0, or what float32 takes for it
        return logits.argmax(dim=-1)
    logits, ids = logits.float().sort(dim=-1, descending=True, stable=True)
    logits = (logits - logits[:, :1]) / sampling.temperature  # the largest becomes 0, so that nothing overflows
    if sampling.top_k:
        logits[:, sampling.top_k :] = -math.inf
    p = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        likelier = p.cumsum(dim=-1) - p  # the probability of all tokens before this one
        p[:, 1:] = p[:, 1:].masked_fill(likelier[:, 1:] >= sampling.top_p, 0)  # the first one always stays
    return ids.gather(1, torch.multinomial(p, 1, generator=generator)).squeeze(1)
