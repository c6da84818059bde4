"""Attention: one description of who may look at whom, and executions of it that agree with each other and with a loop.

The oracle is the definition of the mask written out position by position, and the equation written out query by query.
"""

import math
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from nanollava import attention as module
from nanollava.attention import FLEX_FROM, Mask, attention, attention_maps, attention_weights, fastest, worth_splitting
from nanollava.llama import Llama, LlamaConfig

CPU = torch.device("cpu")
E = 16  # width of a head

# Two rows each. Two documents and padding (-1); in the branches a shared beginning (0), then branches behind it.
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, -1, -1]])
BRANCHES = torch.tensor([[0, 0, 1, 2, 0, 1, 1, 2, 3], [0, 0, 0, 1, 1, 1, 2, 0, 0]])

CASES = {  # mask, queries, keys
    "full": (Mask(causal=False), 9, 9),
    "full with other keys": (Mask(causal=False), 3, 9),
    "causal": (Mask(), 9, 9),
    "one token behind a cache": (Mask(offset=8), 1, 9),
    "several tokens behind a cache": (Mask(offset=5), 4, 9),
    "documents": (Mask(documents=DOCUMENTS), 9, 9),
    "documents, not causal": (Mask(causal=False, documents=DOCUMENTS), 9, 9),
    "branches": (Mask(branches=torch.tensor([[0, 0, 0, 1, 1, 2, 2, 3, 3]] * 2)), 9, 9),
    "documents and branches": (Mask(documents=DOCUMENTS, branches=BRANCHES), 9, 9),
    "documents and branches behind a cache": (Mask(offset=5, documents=DOCUMENTS, branches=BRANCHES), 4, 9),
}
every_mask = pytest.mark.parametrize(("mask", "queries", "keys"), CASES.values(), ids=CASES)
every_head = pytest.mark.parametrize("kv_heads", [4, 2, 1])


def may_look(mask: Mask, b: int, query: int, key: int) -> bool:
    """The docstring of Mask, one pair at a time."""
    query += mask.offset
    if mask.causal and key > query:
        return False
    if mask.documents is not None and mask.documents[b, key] != mask.documents[b, query]:
        return False
    if mask.branches is not None and mask.branches[b, key] != 0:
        return bool(mask.branches[b, key] == mask.branches[b, query])
    return True


def by_loops(mask: Mask, q, k, v):
    """softmax(q k / sqrt(E)) v, one query of one head at a time; query heads share key/value heads in neighbours."""
    out, share = torch.zeros_like(q), q.shape[1] // k.shape[1]
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        seen = [j for j in range(k.shape[2]) if may_look(mask, b, i, j)]
        scores = torch.stack([q[b, h, i] @ k[b, h // share, j] for j in seen]) / math.sqrt(q.shape[3])
        out[b, h, i] = scores.softmax(0) @ v[b, h // share, seen]
    return out


def qkv(queries: int, keys: int, kv_heads: int, batch: int = 2, device=CPU):
    draw = torch.Generator().manual_seed(0)
    shapes = (batch, 4, queries, E), (batch, kv_heads, keys, E), (batch, kv_heads, keys, E)
    return [torch.randn(shape, generator=draw).to(device).requires_grad_() for shape in shapes]


def run(how: str | None, mask: Mask, q, k, v):
    return attention(mask, q.shape[0], q.shape[2], k.shape[2], q.device, how)(q, k, v)


# ---------------------------------------------------------------- the mask


def test_a_packed_row_worked_by_hand():
    mask = Mask(documents=torch.tensor([[0, 0, 0, 0, 1, 1]]), branches=torch.tensor([[0, 1, 1, 2, 0, 1]]))
    rows = [
        "x.....",
        "xx....",
        "xxx...",
        "x..x..",  # branch 2 sees the shared beginning and itself, not branch 1
        "....x.",  # the second document starts anew
        "....xx",
    ]
    assert mask.dense(1, 6, 6, CPU)[0, 0].tolist() == [[sign == "x" for sign in row] for row in rows]


@every_mask
def test_the_dense_mask_is_the_definition_pair_by_pair(mask, queries, keys):
    dense = mask.dense(2, queries, keys, CPU).expand(2, 1, queries, keys)
    for b in range(2):
        expected = [[may_look(mask, b, i, j) for j in range(keys)] for i in range(queries)]
        assert dense[b, 0].tolist() == expected


@every_mask
def test_no_query_is_left_without_a_key(mask, queries, keys):
    """Not even padding: a softmax over nothing is NaN."""
    assert mask.dense(2, queries, keys, CPU).any(-1).all()


# ---------------------------------------------------------------- the executions


@every_head
@every_mask
@pytest.mark.parametrize("how", ["plain", "sdpa", None])
def test_the_result_is_the_equation_query_by_query(how, mask, queries, keys, kv_heads):
    q, k, v = qkv(queries, keys, kv_heads)
    # float32 sums of 16 products in another order: a few units of 6e-8
    torch.testing.assert_close(run(how, mask, q, k, v), by_loops(mask, q, k, v), rtol=1e-5, atol=2e-6)


@every_head
@every_mask
def test_documents_one_by_one_give_the_equation_and_its_gradients(mask, queries, keys, kv_heads, monkeypatch):
    monkeypatch.setattr(module, "SAVED_BY_SPLIT", -math.inf)
    split = run("sdpa", mask, *(ours := qkv(queries, keys, kv_heads)))
    used = worth_splitting(mask, queries, keys, CPU) is not None
    assert used == (mask.documents is not None and mask.causal and queries == keys)
    weights = torch.randn(split.shape, generator=torch.Generator().manual_seed(1))
    (split * weights).sum().backward()
    expected = by_loops(mask, *(theirs := qkv(queries, keys, kv_heads)))
    (expected * weights).sum().backward()
    torch.testing.assert_close(split, expected, rtol=1e-5, atol=2e-6)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_documents_are_split_where_enough_is_masked_out():
    halves = torch.tensor([[0] * 160 + [1] * 160])  # each saves 320^2 / 2 - 160^2 = 25,600 pairs
    assert worth_splitting(Mask(documents=halves), 320, 320, CPU) == [[(160, None), (160, None)]]
    few = halves[:, 80:240]  # 6,400 pairs
    scattered = torch.tensor([[0] * 100 + [1] * 120 + [0] * 100])  # a document that goes on behind another
    for mask in (Mask(documents=few), Mask(documents=scattered), Mask(documents=halves, causal=False), Mask()):
        positions = 320 if mask.documents is None else mask.documents.shape[1]
        assert worth_splitting(mask, positions, positions, CPU) is None
    assert worth_splitting(Mask(documents=halves), 320, 320, torch.device("cuda")) is None


@every_head
@every_mask
def test_the_maps_are_the_softmax_of_each_query(mask, queries, keys, kv_heads):
    q, k, v = qkv(queries, keys, kv_heads)
    with attention_maps() as maps:
        found = run(None, mask, q, k, v)
    torch.testing.assert_close(found, by_loops(mask, q, k, v), rtol=1e-5, atol=2e-6)
    unit = torch.eye(keys, E)  # values that tell the keys apart: what comes out are the weights
    expected = by_loops(mask, q, k, unit.expand_as(k))
    torch.testing.assert_close(maps[0][0], expected[..., :keys], rtol=1e-5, atol=2e-6)


@every_head
@every_mask
def test_on_cuda_a_mask_that_is_written_out_comes_with_keys_for_every_query_head(
    mask, queries, keys, kv_heads, monkeypatch
):
    """As far as a CPU can tell: PyTorch's kernel there takes masks, and no heads that are shared."""
    seen = []

    def spy(q, k, v, **how):
        if "attn_mask" in how:
            seen.append((k.shape[1], v.shape[1], how["enable_gqa"]))
        return sdpa(q, k, v, **how)

    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    q, k, v = qkv(queries, keys, kv_heads)
    found = run("sdpa", mask, q, k, v)
    monkeypatch.undo()
    assert seen == [(4, 4, False)] * len(seen) and bool(seen) == (mask.packed or (1 < queries < keys and mask.causal))
    torch.testing.assert_close(found, by_loops(mask, q, k, v), rtol=1e-5, atol=2e-6)


@every_mask
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_fused_attention_gives_the_same_values_on_cpu(mask, queries, keys):
    q, k, v = (x.detach() for x in qkv(queries, keys, kv_heads=2))
    torch.testing.assert_close(run("flex", mask, q, k, v), run("plain", mask, q, k, v), rtol=1e-5, atol=2e-6)


@every_head
@every_mask
def test_plain_and_sdpa_have_the_same_gradients(mask, queries, keys, kv_heads):
    inputs = qkv(queries, keys, kv_heads)
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    plain, sdpa = (torch.autograd.grad((run(how, mask, *inputs) * weights).sum(), inputs) for how in ("plain", "sdpa"))
    for expected, found in zip(plain, sdpa, strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_attention_weights_sum_to_one_and_are_zero_where_looking_is_not_allowed():
    q, k, _ = qkv(9, 9, 2)
    allowed = Mask(documents=DOCUMENTS, branches=BRANCHES).dense(2, 9, 9, CPU)
    weights = attention_weights(allowed, q, k)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))
    assert (weights[~allowed.expand_as(weights)] == 0).all() and (weights[allowed.expand_as(weights)] > 0).all()


def test_half_precision_keeps_its_type():
    q, k, v = (x.bfloat16() for x in qkv(9, 9, 2))
    for how in ("plain", "sdpa"):
        assert run(how, Mask(), q, k, v).dtype == torch.bfloat16


# ---------------------------------------------------------------- the fused one


LONG = 300  # more than two blocks of FlexAttention, 128 positions each, and no multiple of them


def long_row() -> Mask:
    documents = torch.tensor([[0] * 130 + [1] * 170, [0] * 290 + [-1] * 10])
    branches = torch.tensor([[0] * 20 + [1] * 50 + [2] * 60 + [0] * 170, [0] * 128 + [1] * 128 + [2] * 44])
    return Mask(documents=documents, branches=branches)


def test_the_block_mask_of_the_fused_attention_is_the_dense_mask():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    for mask in (long_row(), Mask(), Mask(offset=40), replace(long_row(), offset=40)):
        queries = LONG - mask.offset
        blocks = attention(mask, 2, queries, LONG, CPU, how="flex").keywords["block_mask"]
        dense = mask.dense(2, queries, LONG, CPU).expand(2, 1, queries, LONG)
        written_out = flex.create_mask(blocks.mask_mod, 2, 1, queries, LONG, device="cpu")
        assert torch.equal(written_out, dense)
        padded = torch.nn.functional.pad(dense, (0, 384 - LONG, 0, 384 - queries))
        tiles = padded.unflatten(3, (-1, 128)).unflatten(2, (-1, 128)).any(5).any(3)  # (B, 1, 3, 3)
        assert torch.equal(blocks.to_dense().bool()[..., : -(-queries // 128), :], tiles[..., : -(-queries // 128), :])


def test_blocks_that_the_mask_empties_are_not_computed():
    blocks = attention(long_row(), 2, LONG, LONG, CPU, how="flex").keywords["block_mask"].to_dense()
    # row 0: the second document begins at 130, so its last tile needs nothing of the first tile of keys
    assert blocks[0, 0].tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    # row 1: the tile at 128 is branch 1, the one at 256 branch 2: they share the first tile and not each other
    assert blocks[1, 0].tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]


PACKED = Mask(documents=DOCUMENTS)


@pytest.mark.parametrize(
    ("mask", "queries", "device", "compiler", "expected"),
    [
        (PACKED, FLEX_FROM, "cuda", True, "flex"),
        (Mask(branches=BRANCHES), 2 * FLEX_FROM, "cuda:1", True, "flex"),
        (PACKED, FLEX_FROM - 1, "cuda", True, "sdpa"),  # a short row
        (PACKED, 1, "cuda", True, "sdpa"),  # a token behind a cache of prompts padded on the left
        (PACKED, FLEX_FROM, "cuda", False, "sdpa"),
        (PACKED, FLEX_FROM, "cpu", True, "sdpa"),
        (PACKED, FLEX_FROM, "mps", True, "sdpa"),
        (Mask(), FLEX_FROM, "cuda", True, "sdpa"),  # is_causal says it all
        (Mask(causal=False), FLEX_FROM, "cuda", True, "sdpa"),  # the tower
    ],
)
def test_what_is_fastest_is_chosen_by_length_mask_and_device(mask, queries, device, compiler, expected, monkeypatch):
    monkeypatch.setattr(module, "can_compile", lambda device_type: compiler)
    assert fastest(mask, queries, torch.device(device)) == expected


@pytest.mark.filterwarnings("ignore:flex_attention called")
def test_the_block_mask_of_a_batch_is_made_once_for_all_layers(monkeypatch):
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    made, create = [], flex.create_block_mask
    monkeypatch.setattr(flex, "create_block_mask", lambda *args, **sizes: made.append(sizes) or create(*args, **sizes))
    monkeypatch.setattr(module, "fastest", lambda *_: "flex")
    torch.manual_seed(0)
    model, x = Llama(LlamaConfig(50, 64, 64, 5, 4, 2)), torch.randn(2, LONG, 64)
    with torch.no_grad():
        found = model.hidden(x, mask=long_row())
        assert len(made) == 1
        with attention_maps():
            torch.testing.assert_close(found, model.hidden(x, mask=long_row()), rtol=1e-4, atol=1e-5)
        model.hidden(x, mask=long_row())
    assert [(sizes["B"], sizes["H"], sizes["Q_LEN"]) for sizes in made] == [(2, None, LONG)] * 2


def packed_inputs(batch: int, length: int):
    """q, k, v, and the block mask of rows of documents with branches."""
    documents = torch.arange(length).expand(batch, -1) // 100
    mask = Mask(documents=documents, branches=documents % 2)
    q, k, v = (x.detach() for x in qkv(length, length, 2, batch))
    return mask, q, k, v, attention(mask, batch, length, length, CPU, how="flex").keywords["block_mask"]


def test_other_lengths_and_numbers_of_rows_are_not_compiled_anew():
    """What CUDA does, with a compiler that only records. A row alone is another graph than several, for torch.compile
    takes a size of 1 for a constant, and so is a pass without gradients: four in all, and PyTorch gives up after 8."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    graphs, count = [], {}
    torch._dynamo.reset()
    kernel = torch.compile(
        flex.flex_attention, dynamic=True, fullgraph=True, backend=lambda g, _: graphs.append(g) or g.forward
    )
    for batch in (5, 7, 1, 6):  # not 2 (key heads) or 3 (blocks) first: sizes equal by chance make another graph
        for gradients in (True, False):
            for length in (LONG, 301, 320, 384, 448):  # collate makes multiples of 64
                mask, q, k, v, blocks = packed_inputs(batch, length)
                with torch.set_grad_enabled(gradients):
                    found = kernel(q, k, v, block_mask=blocks, enable_gqa=True)
                torch.testing.assert_close(found, run("plain", mask, q, k, v), rtol=1e-5, atol=2e-6)
            count[batch, gradients] = len(graphs)
    assert list(count.values()) == [1, 2, 2, 2, 3, 4, 4, 4]


COMPILES = sys.platform == "linux" and shutil.which("g++") and torch.backends.cpu.get_cpu_capability().startswith("AVX")


@pytest.mark.skipif(not COMPILES, reason="FlexAttention compiles on a CPU on Linux only, with AVX2 and a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_the_compiled_kernel_gives_the_same_values_forward_on_a_cpu():
    """PyTorch's compiler itself. dynamic=False: with dynamic shapes 2.13 writes C++ for a CPU that does not compile."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    torch._dynamo.reset()
    before = counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"]
    mask, q, k, v, blocks = packed_inputs(2, LONG)
    found = torch.compile(flex.flex_attention, dynamic=False)(q, k, v, block_mask=blocks, enable_gqa=True)
    torch.testing.assert_close(found, run("plain", mask, q, k, v), rtol=1e-5, atol=2e-6)
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"] == before + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has its kernel and its backward on CUDA only")
@every_head
def test_on_cuda_the_fused_attention_equals_sdpa_forward_and_backward(kv_heads):
    device = torch.device("cuda")
    mask = long_row()
    mask = replace(mask, documents=mask.documents.to(device), branches=mask.branches.to(device))
    inputs = qkv(LONG, LONG, kv_heads, device=device)
    results = []
    for how in ("sdpa", "flex"):
        out = run(how, mask, *inputs)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
        results.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=5e-3)  # products may be in TF32: 10 bits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the fused attention is chosen on CUDA only")
def test_on_cuda_long_packed_rows_take_the_fused_attention_by_themselves():
    mask = Mask(documents=torch.zeros(1, FLEX_FROM, dtype=torch.long, device="cuda"))
    assert "block_mask" in attention(mask, 1, FLEX_FROM, FLEX_FROM, torch.device("cuda")).keywords
