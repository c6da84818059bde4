"""Attention: one description of who may look at whom, and executions of it that agree with each other and with a loop.

The oracle is the definition of the mask written out position by position, and the equation written out query by query.
"""

import math
from dataclasses import replace

import pytest
import torch

from nanollava.attention import Mask, attention, attention_weights

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


def test_the_mask_is_traced_into_one_graph_and_new_batches_do_not_compile_again():
    """What CUDA does, with a compiler that only records: the kernel must survive other lengths and documents."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    graphs, compiled_after = [], []
    torch._dynamo.reset()
    kernel = torch.compile(
        flex.flex_attention, dynamic=True, fullgraph=True, backend=lambda g, _: graphs.append(g) or g.forward
    )
    for length in (LONG, 301, 427):
        documents = torch.arange(length).expand(2, -1) // 100
        mask = Mask(documents=documents, branches=documents % 2)
        q, k, v = (x.detach() for x in qkv(length, length, 2))
        blocks = attention(mask, 2, length, length, CPU, how="flex").keywords["block_mask"]
        found = kernel(q, k, v, block_mask=blocks, enable_gqa=True)
        torch.testing.assert_close(found, run("plain", mask, q, k, v), rtol=1e-5, atol=2e-6)
        compiled_after.append(len(graphs))
    assert compiled_after[0] > 0 and len(set(compiled_after)) == 1


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
def test_on_cuda_packed_rows_take_the_fused_attention_by_themselves():
    mask = Mask(documents=DOCUMENTS.to("cuda"))
    assert "block_mask" in attention(mask, 2, 9, 9, torch.device("cuda")).keywords
