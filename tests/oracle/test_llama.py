"""The language model gives the logits of transformers' LlamaForCausalLM, and takes its weights by their names."""

import pytest
import torch

from nanollava.llama import Cache, Llama, LlamaConfig, RMSNorm, rotary_angles

transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install .[oracle]")

TOLERANCE = 2e-5  # relative, float32: roundings of 1e-7 through a few blocks
SIZES = {
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 4096,
}
KINDS = {
    "v1.3": {"rms_norm_eps": 1e-6},
    "v1.5": {"rms_norm_eps": 1e-5},
    "shared key and value heads": {"num_key_value_heads": 2},
    "one key and value head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 3},
    "large theta": {"rope_theta": 500_000.0},
    "wide heads": {"head_dim": 16},
}
every_kind = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def their_config(rope_theta: float = 10_000.0, **settings):
    rope = {"rope_type": "default", "rope_theta": rope_theta}
    return transformers.LlamaConfig(**{**SIZES, **settings}, rope_parameters=rope)


def ours_and_theirs(scale: float = 0.15, **settings):
    """Two decoders with one set of random weights, the norms' too: at 1 they would prove nothing."""
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(their_config(**settings)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    ours = Llama(LlamaConfig(**{**SIZES, **settings}))
    ours.load_state_dict({name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()})
    return ours.eval(), theirs


@every_kind
@pytest.mark.parametrize("scale", [0.15, 1e-3])  # with tiny embeddings eps decides what the first norm gives
def test_logits_are_those_of_llama(settings, scale):
    ours, theirs = ours_and_theirs(scale, **settings)
    token_ids = torch.randint(0, 90, (2, 24))
    with torch.no_grad():
        assert error(ours(token_ids), theirs(token_ids).logits) < TOLERANCE


@every_kind
def test_gradients_are_those_of_llama(settings):
    ours, theirs = ours_and_theirs(**settings)
    token_ids = torch.randint(0, 90, (2, 12))
    weights = torch.randn(2, 12, 90)
    (ours(token_ids) * weights).sum().backward()
    (theirs(token_ids).logits * weights).sum().backward()
    expected = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert error(parameter.grad, expected[name]) < 1e-4, name  # sums over all positions: more roundings


def test_far_positions_turn_like_theirs():
    """At position 4000 a frequency that is off in its last bit shows in the fourth decimal."""
    ours, theirs = ours_and_theirs()
    token_ids = torch.randint(0, 90, (1, 64))
    positions = torch.arange(64).mul(63)[None]  # 0 ... 3969
    with torch.no_grad():
        found = ours.lm_head(ours.hidden(ours.embed_tokens(token_ids), positions))
        assert error(found, theirs(token_ids, position_ids=positions).logits) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_angle_up_to_the_longest_row_is_theirs_to_the_bit(dtype):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    positions = torch.arange(4096)[None]
    expected = LlamaRotaryEmbedding(their_config(hidden_size=768))(torch.zeros(1, dtype=dtype), positions)
    found = rotary_angles(positions, LlamaConfig(**{**SIZES, "hidden_size": 768}), dtype)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype and torch.equal(ours[:, 0], theirs)


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_the_norm_of_tiny_bfloat16_numbers_is_theirs_to_the_bit(eps):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    x = (torch.randn(8, 256) * 1e-3).bfloat16()
    ours, theirs = RMSNorm(256, eps).bfloat16(), LlamaRMSNorm(256, eps).bfloat16()
    with torch.no_grad():
        theirs.weight.normal_()
        ours.weight.copy_(theirs.weight)
    assert torch.equal(ours(x), theirs(x))


def test_decoding_with_a_cache_gives_the_logits_of_theirs_at_every_step():
    ours, theirs = ours_and_theirs(num_key_value_heads=2)
    token_ids = torch.randint(0, 90, (2, 16))
    cache, their_cache = Cache(ours.config, 2, 16, token_ids.device, torch.float32), transformers.DynamicCache()
    with torch.no_grad():
        for piece in token_ids.split([7, 1, 1, 1, 3, 1, 1, 1], dim=1):
            expected = theirs(piece, past_key_values=their_cache, use_cache=True).logits
            assert error(ours(piece, cache), expected) < TOLERANCE


def test_defaults_are_those_of_llama():
    """A config of an official folder lists only what differs from them."""
    theirs, ours = transformers.LlamaConfig(), LlamaConfig()
    assert theirs.rope_parameters["rope_theta"] == ours.rope_theta
    assert all(getattr(theirs, name) == value for name, value in vars(ours).items() if name != "rope_theta")
