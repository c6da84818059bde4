"""What training does to the decoder's blocks, from outside: compile them, and recompute them in backward."""

import functools

import torch
from torch.utils.checkpoint import checkpoint

from nanollava.attention import or_plain
from nanollava.llama import Llama


def prepare_blocks(language: Llama, recompute: bool, compiled: bool) -> None:
    """Give the blocks of a decoder another ``forward``; names and weights stay as they are.

    recompute: of a block only its input is kept, (B, T, D) numbers; backward runs it once more (Chen et al., 2016,
    Training Deep Nets with Sublinear Memory Cost). The same numbers come out, for one more forward pass.
    compiled: torch.compile, inside what is recomputed.
    """
    forward = type(language.layers[0]).forward
    program = or_plain(torch.compile(forward, dynamic=True), forward) if compiled else None
    for block in language.layers:
        if compiled:  # one compilation serves all: the blocks differ in weights alone
            block.forward = functools.partial(program, block)
        if recompute:
            # the reentrant form needs an input with a gradient, which text alone does not have under LoRA
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
