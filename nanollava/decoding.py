"""One pass of decoding, as PyTorch runs it or as one compiled program.

A new token reads every weight once, so its time should be the bytes of the weights over the memory's bandwidth. As
PyTorch runs it, some twenty small operations for each block come on top, each started by itself. torch.compile makes
one program of the whole step; on CUDA it is recorded as a CUDA graph and replayed.

A program is made for fixed shapes, or for a size that it was told may vary: here the cache's capacity.

    Cache        hands out  k0 k1 k2          one more at each step, another shape
    FixedCache   hands out  k0 k1 k2 .  .  .  one shape for a whole answer; the mask hides what is not filled yet

Shapes: B batch, T positions of this pass, D language width, K key/value heads, E width of a head, V vocabulary.
"""

import torch
from torch import Tensor

from nanollava.attention import Mask, can_compile, or_plain
from nanollava.llama import Cache, Llama
from nanollava.llava import Llava


def next_logits(language: Llama, x: Tensor, cache: Cache, padding: Tensor | None = None) -> Tensor:
    """Embeddings (B, T, D), behind what the cache holds -> (B, V) logits of what comes next.

    padding: (B,), how many of a row's first positions are none; None where all rows are equally long.
    """
    B, T, _ = x.shape
    positions, documents = (cache.length + torch.arange(T, device=x.device)).expand(B, T), None
    if padding is not None:
        positions = (positions - padding[:, None]).clamp(min=0)  # 0 at a row's first token
        keys = torch.arange(cache.span(T), device=x.device)
        documents = -(keys < padding[:, None]).int()  # padding is a document of its own, number -1
    hidden = language.hidden(x, positions, Mask(offset=cache.length, documents=documents), cache)
    return language.lm_head(hidden[:, -1])


class FixedCache(Cache):
    """A filled cache for steps of one token that all have the same shapes; its length is a tensor, (1,)."""

    def __init__(self, filled: Cache):
        self.keys, self.values = filled.keys, filled.values
        self.length = torch.tensor([filled.length], device=self.keys[0].device)
        for kept in (*self.keys, *self.values):
            torch._dynamo.mark_dynamic(kept, 2)  # one program serves all capacities
        if self.length.is_cuda:
            for tensor in (*self.keys, *self.values, self.length):
                torch._dynamo.mark_static_address(tensor)  # a CUDA graph writes where it was recorded

    def span(self, T: int) -> int:
        """All positions that there is room for."""
        return self.keys[0].shape[2]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v, (B, K, 1, E), behind what is there; return everything, (B, K, capacity, E)."""
        self.keys[layer].index_copy_(2, self.length, k)
        self.values[layer].index_copy_(2, self.length, v)
        return self.keys[layer], self.values[layer]


def compile_decoding(model: Llava) -> Llava:
    """Give a model a compiled step: its answers take it from the second token on. Returns the model.

    The first answer waits for the compiler, up to a minute on a CPU; what it made is kept on disk by PyTorch. Without a
    compiler it says so, once, and answers come as before.
    """
    if can_compile(model.device.type):
        options = {"triton.cudagraphs": True} if model.device.type == "cuda" else {"cpp_wrapper": True}
        model.step = or_plain(torch.compile(next_logits, options=options), next_logits)
    return model
