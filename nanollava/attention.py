"""Who may look at whom, said once, and the ways to carry it out.

    softmax(q k^T / sqrt(E) + mask) v, the mask 0 where a query may look and -inf elsewhere
    (Vaswani et al., 2017, equation 1)

A ``Mask`` describes the pattern. ``attention(mask, ...)`` turns it into a function ``attend(q, k, v)`` that every layer
of a forward pass then shares:

    maps are asked for                      plain         the equation as it stands
    CUDA, a packed row of FLEX_FROM or more flex          FlexAttention under torch.compile: one kernel; blocks of pairs
                                                          that the mask empties are never computed (Dong et al., 2024)
    nothing packed: causal, or full         sdpa          PyTorch's scaled_dot_product_attention, without a mask
    a packed row of long documents on a CPU by_document   sdpa for each document, whose own mask is causal
    anything else                           masked        sdpa with the pattern written out

Shapes: B batch, T positions, H query heads, K key/value heads, E width of a head.
"""

import functools
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanollava.error import first_line

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# Positions from which a packed row takes flex on CUDA. Not measured here: on one H200, forward and backward of a 125M
# decoder on rows of 8 documents, flex is reported to reach 0.72 of sdpa's tokens/s at 512 positions and 1.31 at 2,048
# (KempnerInstitute/KempnerForge, pull request 207). `attention(..., how=)` takes either, to time them elsewhere.
FLEX_FROM = 1024

# Pairs of positions of different documents, for each document of a row, from which a CPU takes them one by one.
# Measured on 2 cores, forward and backward, heads of 32 and 64: at 3,000 pairs 0.7 to 1.7 times as fast as under one
# mask, at 12,000 1.2 to 2.1 times, at 300,000 6 to 8 times.
SAVED_BY_SPLIT = 12_000
Piece = tuple[int, Tensor | None]  # its length, and its mask where it has branches


class Asked(threading.local):
    """What is asked of the forward passes of a thread. Not a ContextVar: torch.compile cannot trace these."""

    def __init__(self):  # once in each thread
        self.maps: list[list[Tensor]] | None = None  # where attention maps go


asked = Asked()


@dataclass(frozen=True)
class Mask:
    """The pattern of one forward pass.

    causal     a query sees no key after it
    offset     how many cached keys stand before the first query; a tensor (1,) where one program serves all lengths
    documents  (B, T of the keys) number of the document at each position; documents do not see each other
    branches   (B, T of the keys) within a document: 0 is a shared beginning that every branch sees,
               positions of different branches above 0 do not see each other

    Training packs several records into a row, and questions about one image behind a single copy of it:

        row        <image> question A answer   question B answer   another record
        documents     0        0        0          0        0        1      1
        branches      0        1        1          2        2        1      1

    Padding is a document of its own, -1: a query that might see no key at all would have a softmax over nothing, NaN.
    """

    causal: bool = True
    offset: int | Tensor = 0
    documents: Tensor | None = None
    branches: Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.documents is not None or self.branches is not None

    def allows(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether query q of row b may look at key k: integer tensors that broadcast, so it serves the dense mask as
        well as FlexAttention's mask_mod."""
        q = q + self.offset
        allowed = k <= q if self.causal else k >= 0
        if self.documents is not None:
            allowed = allowed & (self.documents[b, q] == self.documents[b, k])
        if self.branches is not None:
            branch = self.branches[b, k]
            allowed = allowed & ((branch == 0) | (branch == self.branches[b, q]))
        return allowed

    def dense(self, batch: int, queries: int, keys: int, device: torch.device) -> Tensor:
        """(B or 1, 1, queries, keys) bool: the whole pattern written out."""
        b = torch.arange(batch if self.packed else 1, device=device).view(-1, 1, 1)
        q = torch.arange(queries, device=device).view(1, -1, 1)
        k = torch.arange(keys, device=device).view(1, 1, -1)
        return self.allows(b, q, k).unsqueeze(1)


def attention(mask: Mask, batch: int, queries: int, keys: int, device: torch.device, how: str | None = None) -> Attend:
    """The function ``attend(q, k, v)`` that carries out ``mask``.

    q is (B, H, queries, E), k and v are (B, K, keys, E) with K dividing H; the result is (B, H, queries, E).
    ``how`` is "plain", "sdpa" or "flex"; None takes plain, and keeps the weights, inside ``attention_maps``, and
    elsewhere what is fastest.
    """
    if how is None and asked.maps is not None:
        asked.maps.append([])
        return functools.partial(plain, mask.dense(batch, queries, keys, device), layers=asked.maps[-1])
    how = how or fastest(mask, queries, device)
    if how == "flex":
        return flex(mask, batch, queries, keys, device)
    if how == "plain":
        return functools.partial(plain, mask.dense(batch, queries, keys, device))
    # a single new token sees the whole cache; is_causal lets query 0 see key 0 alone, so it is right without a cache
    simple = not mask.packed and not isinstance(mask.offset, Tensor)
    unmasked = simple and (not mask.causal or (queries == 1 and keys == mask.offset + 1))
    if unmasked or (simple and mask.causal and mask.offset == 0 and queries == keys):
        return functools.partial(F.scaled_dot_product_attention, is_causal=not unmasked, enable_gqa=True)
    if (rows := worth_splitting(mask, queries, keys, device)) is not None:
        return functools.partial(by_document, rows)
    return functools.partial(masked, mask.dense(batch, queries, keys, device))


def fastest(mask: Mask, queries: int, device: torch.device) -> str:
    """Packed rows of FLEX_FROM positions or more on CUDA, where kernels can be compiled, take "flex", others "sdpa"."""
    fused = mask.packed and torch.device(device).type == "cuda" and queries >= FLEX_FROM and can_compile("cuda")
    return "flex" if fused else "sdpa"


@contextmanager
def attention_maps() -> Iterator[list[list[Tensor]]]:
    """Where each layer looks: ``with attention_maps() as maps: model(...)``.

    maps[i][l] is (B, H, queries, keys), the softmax of the paper's equation in layer l of forward pass i: the vision
    tower's (class token first) comes before the decoder's, and with a cache every step is a pass of its own. Maps have
    the dtype of the queries, and no gradient. They are of the passes begun inside, in this thread, in plain execution;
    of two blocks in each other the inner one gets them. Blocks recomputed in backward add theirs once more, if backward
    runs inside: leave first.
    """
    maps: list[list[Tensor]] = []
    before, asked.maps = asked.maps, maps
    try:
        yield maps
    finally:
        asked.maps = before
        maps[:] = map(list, maps)  # nothing that happens from now on changes them


def plain(allowed: Tensor, q: Tensor, k: Tensor, v: Tensor, layers: list[Tensor] | None = None) -> Tensor:
    """The equation itself. allowed is (B or 1, 1, queries, keys) bool; the weights are added to ``layers``."""
    weights = attention_weights(allowed, q, k)
    if layers is not None:
        layers.append(weights.detach())
    return weights @ repeat_heads(v, q)


def attention_weights(allowed: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """(B, H, queries, keys): how much each query looks at each key; every row sums to one."""
    scores = q @ repeat_heads(k, q).transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~allowed, -math.inf).float().softmax(dim=-1).to(q.dtype)


def repeat_heads(x: Tensor, q: Tensor) -> Tensor:
    """(B, K, T, E) -> (B, H, T, E): each key/value head serves H/K neighbouring query heads."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def masked(allowed: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention with a mask written out. Its CUDA kernel for masks does not know shared heads (PyTorch's
    documentation, enable_gqa): given both, it would write out all (B, H, queries, keys) scores."""
    if q.is_cuda:
        k, v = repeat_heads(k, q), repeat_heads(v, q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=not q.is_cuda)


def worth_splitting(mask: Mask, queries: int, keys: int, device: torch.device) -> list[list[Piece]] | None:
    """The documents of each row, where a CPU computes them faster one by one than all under a mask written out, whose
    products it throws away. None where it does not, or where they do not stand one behind another."""
    whole = mask.causal and isinstance(mask.offset, int) and mask.offset == 0 and queries == keys
    if not whole or mask.documents is None or torch.device(device).type != "cpu" or torch.compiler.is_compiling():
        return None
    lengths = [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in mask.documents]
    saved = len(lengths) * keys**2 - sum(n**2 for row in lengths for n in row)
    if saved < SAVED_BY_SPLIT * sum(map(len, lengths)) or any(map(scattered, mask.documents)):
        return None
    return [documents_of(mask, row, lengths[row]) for row in range(len(lengths))]


def scattered(documents: Tensor) -> bool:
    """Whether a document goes on behind another one, (T,)."""
    return len(documents.unique_consecutive()) != len(documents.unique())


def documents_of(mask: Mask, row: int, lengths: list[int]) -> list[Piece]:
    """Length and mask of each document of a row; None is plain causal."""
    documents, start = [], 0
    for length in lengths:
        inside = mask.branches[row : row + 1, start : start + length] if mask.branches is not None else None
        branched = inside is not None and bool((inside != inside[:, :1]).any())  # of one branch all see each other
        documents.append((length, Mask(branches=inside).dense(1, length, length, inside.device) if branched else None))
        start += length
    return documents


@torch.compiler.disable  # the lengths differ from batch to batch, and each would be a program of its own
def by_document(documents: list[list[Piece]], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention, a call for each document of each row."""
    rows = []
    for row, *qkv in zip(documents, q.split(1), k.split(1), v.split(1), strict=True):
        pieces = zip(row, *(x.split([length for length, _ in row], dim=2) for x in qkv), strict=True)
        out = [
            F.scaled_dot_product_attention(*piece, attn_mask=allowed, is_causal=allowed is None, enable_gqa=True)
            for (_, allowed), *piece in pieces
        ]
        rows.append(torch.cat(out, dim=2))
    return torch.cat(rows)


def flex(mask: Mask, batch: int, queries: int, keys: int, device: torch.device) -> Attend:
    """FlexAttention with the mask as its mask_mod; compiled on CUDA, eager (forward only) elsewhere.

    The block mask is made once for all layers, and not by a compiled function: it takes some hundred operations that
    write no more than a bool for each query and key.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    on_cuda = torch.device(device).type == "cuda"
    blocks = create_block_mask(
        lambda b, h, q, k: mask.allows(b, q, k), B=batch, H=None, Q_LEN=queries, KV_LEN=keys, device=str(device)
    )
    kernel = compiled(flex_attention) if on_cuda else flex_attention
    return functools.partial(kernel, block_mask=blocks, enable_gqa=True)


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile works: on a CPU it needs a C++ compiler, on CUDA Triton and a C compiler; other devices are
    not tried. Says so, once, where something lacks."""
    found, needed = False, f"compiler for {device_type}"
    if device_type == "cuda":
        needed = "Triton or C compiler"
        found = importlib.util.find_spec("triton") is not None and any(map(shutil.which, ("cc", "gcc", "clang")))
    elif device_type == "cpu":
        needed, found = "C++ compiler", find_cpp_compiler()
    if not found:
        print(f"no {needed} found: what would be compiled is run step by step, more slowly", file=sys.stderr)
    return found


def find_cpp_compiler() -> bool:
    """Whether there is a C++ compiler that works. Inductor looks for one name alone, so it is told what was found."""
    from torch._inductor.config import cpp

    for name in [os.environ["CXX"]] if "CXX" in os.environ else [cpp.cxx[1], "g++", "c++", "clang++"]:
        if shutil.which(name) and compiles(name):
            cpp.cxx = (None, name)
            return True
    return False


def compiles(compiler: str) -> bool:
    """Whether a C++ compiler takes a line that needs a header."""
    words = [compiler, "-x", "c++", "-fsyntax-only", "-"]
    try:
        return not subprocess.run(words, input=b"#include <vector>\n", capture_output=True).returncode
    except OSError:
        return False


def or_plain(program: Callable, function: Callable) -> Callable:
    """A function's compiled program; where that cannot be made after all (a library is missing, the disk of the
    compiler's cache is full) it says so, once, and from then on the function itself."""

    def run(*given: object) -> object:
        nonlocal program
        try:
            return program(*given)
        except torch._dynamo.exc.BackendCompilerFailed as error:  # nothing of it has been run yet
            print(f"\ncannot compile ({first_line(error)}): it is run step by step, more slowly", file=sys.stderr)
            program = function
        return function(*given)

    return run


@functools.cache
def compiled(function: Callable) -> Callable:
    """torch.compile, once for each function: masks and lengths change from batch to batch, the kernel does not."""
    return torch.compile(function, dynamic=True)
