"""The language model against its equations: norm, rotation, shared heads, cache, packed rows, official sizes."""

import math

import pytest
import torch

from nanollava.attention import Mask
from nanollava.llama import Cache, Llama, LlamaConfig, RMSNorm, SwiGLU, rotary_angles, rotate

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
KINDS = {
    "own keys and values": {},
    "shared keys and values": {"num_key_value_heads": 2},
    "one key head, wide heads, tied": {"num_key_value_heads": 1, "head_dim": 12, "tie_word_embeddings": True},
}
every_kind = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)


def llama(**settings) -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig(**SIZES, **settings)).eval().requires_grad_(False)


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(1))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the order in which float32 numbers of size one are summed."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("width", "inner", "layers", "heads", "parameters", "tensors"),
    [(4096, 11008, 32, 32, 6_738_415_616, 291), (5120, 13824, 40, 40, 13_015_864_320, 363)],
    ids=["7B", "13B"],
)
def test_the_official_sizes_have_the_official_tensors(width, inner, layers, heads, parameters, tensors):
    with torch.device("meta"):
        model = Llama(LlamaConfig(32000, width, inner, layers, heads))
    found = model.state_dict()
    assert (len(found), sum(t.numel() for t in found.values())) == (tensors, parameters)


def test_a_tied_head_is_the_embedding():
    model = llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert sum(p.numel() for p in llama().parameters()) - sum(p.numel() for p in model.parameters()) == 50 * 32


def test_the_width_of_a_head_may_be_given():
    narrow, wide = (model.layers[0].self_attn.q_proj.weight.shape for model in (llama(), llama(head_dim=12)))
    assert narrow == (4 * 8, 32) and wide == (4 * 12, 32)


# ---------------------------------------------------------------- the norm


@pytest.mark.parametrize(("eps", "expected"), [(1e-5, [0.632456, 0.843274]), (1e-6, [0.816497, 1.088662])])
def test_the_norm_of_tiny_inputs_depends_on_eps(eps, expected):
    """(0.003, 0.004) has the mean square 1.25e-5: divided by sqrt(2.25e-5) or by sqrt(1.35e-5)."""
    torch.testing.assert_close(RMSNorm(2, eps)(torch.tensor([0.003, 0.004])), torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_the_norm_is_cast_before_the_weight_is_multiplied(eps):
    torch.manual_seed(0)
    norm = RMSNorm(256, eps).bfloat16().requires_grad_(False)
    norm.weight.normal_()
    x = (torch.randn(4, 256) * 1e-3).bfloat16()
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + eps).sqrt()
    cast_first = (exact.bfloat16().double() * norm.weight.double()).bfloat16()
    cast_last = (exact * norm.weight.double()).bfloat16()
    assert not torch.equal(cast_first, cast_last)  # so the next line tells them apart
    assert torch.equal(norm(x), cast_first)


# ---------------------------------------------------------------- the MLP


def test_the_gate_passes_through_silu_and_the_rest_does_not():
    """down(silu(gate x) * up x) with gate 1, up 2, down 3 and x = -1: 3 * (-1 / (1 + e)) * -2."""
    mlp = SwiGLU(1, 1)
    for weight, projection in enumerate((mlp.gate_proj, mlp.up_proj, mlp.down_proj), start=1):
        torch.nn.init.constant_(projection.weight, weight)
    assert mlp(torch.tensor([-1.0])).item() == pytest.approx(6 / (1 + math.e))


# ---------------------------------------------------------------- positions


def test_rotation_worked_by_hand():
    """Heads of four: the pair (0, 2) turns by the position, the pair (1, 3) by a hundredth of it."""
    config = LlamaConfig(hidden_size=4, num_attention_heads=1)
    cos, sin = rotary_angles(torch.tensor([[0, 1, 100]]), config, torch.float32)
    x = torch.tensor([1.0, 2.0, 0.0, 0.0]).expand(1, 1, 3, 4)
    c, s = math.cos, math.sin
    expected = [
        [1, 2, 0, 0],
        [c(1), 2 * c(0.01), s(1), 2 * s(0.01)],
        [c(100), 2 * c(1), s(100), 2 * s(1)],
    ]
    torch.testing.assert_close(rotate(x, cos, sin)[0, 0], torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_a_larger_theta_turns_slower():
    config = LlamaConfig(hidden_size=4, num_attention_heads=1, rope_theta=1e6)
    cos, _ = rotary_angles(torch.tensor([[7]]), config, torch.float32)
    torch.testing.assert_close(cos[0, 0, 0], torch.tensor([7.0, 0.007, 7.0, 0.007]).cos())


def test_a_score_depends_on_the_distance_of_two_positions_only():
    config = LlamaConfig(hidden_size=16, num_attention_heads=1)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x, *rotary_angles(torch.tensor([[position]]), config, torch.float32))

    def score(query: int, key: int) -> float:
        return (turned(q, query) * turned(k, key)).sum().item()

    assert score(3, 1) == pytest.approx(score(40, 38), abs=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 0.01


def test_positions_given_are_positions_counted():
    model, ids = llama(), tokens(2, 9)
    x = model.embed_tokens(ids)
    positions = torch.arange(9).expand(2, 9)
    assert torch.equal(model.hidden(x, positions), model.hidden(x))
    close(model.hidden(x, positions + 30), model.hidden(x))  # all of them shifted: no distance changed
    assert (model.hidden(x, positions * 2) - model.hidden(x)).abs().max() > 0.01


# ---------------------------------------------------------------- attention


@every_kind
def test_a_token_changes_nothing_before_it(settings):
    model, ids = llama(**settings), tokens(1, 10)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 50
    difference = (model(changed) - model(ids)).abs().amax(-1)[0]
    assert (difference[:6] == 0).all() and (difference[6:] > 1e-4).all()


def test_shared_heads_are_heads_with_equal_keys_and_values():
    shared, full = llama(num_key_value_heads=2), llama()
    weights = shared.state_dict()
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:  # (2 heads of 8, D): each head serves two neighbouring query heads
            weights[name] = weight.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    close(shared(tokens(2, 10)), full(tokens(2, 10)))


def test_documents_of_a_packed_row_are_as_if_alone():
    model, ids = llama(num_key_value_heads=2), tokens(1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    positions = torch.tensor([[*range(5), *range(7)]])
    packed = model.hidden(model.embed_tokens(ids), positions, Mask(documents=documents))
    alone = [model.hidden(model.embed_tokens(part)) for part in (ids[:, :5], ids[:, 5:])]
    close(packed, torch.cat(alone, dim=1))


# ---------------------------------------------------------------- the cache


@every_kind
@pytest.mark.parametrize("pieces", [[1] * 12, [12], [7, 1, 1, 1, 1, 1], [3, 4, 5], [1, 10, 1]], ids=str)
def test_decoding_with_a_cache_gives_the_full_forward_at_every_position(settings, pieces):
    model, ids = llama(**settings), tokens(2, 12)
    cache = Cache(model.config, batch=2, capacity=16, device=ids.device, dtype=torch.float32)
    logits = [model(piece, cache) for piece in ids.split(pieces, dim=1)]
    assert cache.length == 12
    close(torch.cat(logits, dim=1), model(ids))


def test_a_cache_holds_what_its_layers_and_heads_need():
    cache = Cache(LlamaConfig(**SIZES, num_key_value_heads=2), 3, 16, torch.device("cpu"), torch.bfloat16)
    assert len(cache.keys) == len(cache.values) == 2
    for kept in (*cache.keys, *cache.values):
        assert kept.shape == (3, 2, 16, 8) and kept.dtype == torch.bfloat16


def test_with_a_cache_the_mask_spans_what_is_filled_and_what_is_new():
    model, ids = llama(), tokens(1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    x = model.embed_tokens(ids)
    cache = Cache(model.config, 1, 12, ids.device, torch.float32)
    first = model.hidden(x[:, :7], mask=Mask(documents=documents[:, :7]), cache=cache)
    second = model.hidden(x[:, 7:], mask=Mask(offset=7, documents=documents), cache=cache)
    close(torch.cat([first, second], dim=1), model.hidden(x, mask=Mask(documents=documents)))
