"""Attention maps are the attentions that transformers returns, of its tower and its decoder, on the same weights."""

import pytest
import torch

from nanollava.attention import attention_maps
from nanollava.generate import Sampling, generate
from nanollava.llama import Cache
from nanollava.maps import patch_attention
from nanollava.tokenizer import IMAGE_TOKEN_ID as IMAGE

transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install .[oracle]")

from tests.oracle.test_llava import THEIR_IMAGE, N, as_ours, their_llava  # noqa: E402  (needs it too)

SIDE = 2  # patches along the side of an image
PROMPT = [1, 8, IMAGE, 5, IMAGE, 6]


def same(found: list[torch.Tensor], expected: tuple[torch.Tensor, ...]) -> None:
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.std() > 0.02  # no even spread, which anything would give
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    model = their_llava().eval()
    model.set_attn_implementation("eager")  # the only one that returns its maps
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=1 if "q_proj" in name else 0.3)
    return model


@pytest.fixture(scope="module")
def ours(theirs):
    return as_ours(theirs)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def widened(row: list[int]) -> torch.Tensor:
    """transformers wants the image token repeated."""
    return torch.tensor([[t for token in row for t in ([THEIR_IMAGE] * N if token == IMAGE else [token])]])


@torch.no_grad()
def test_maps_of_an_image_and_text_are_those_of_llava(ours, theirs, pixels):
    with attention_maps() as maps:
        ours(torch.tensor([PROMPT]), pixels)
    expected = theirs(input_ids=widened(PROMPT), pixel_values=pixels, output_attentions=True)
    same(maps[1], expected.attentions)


@torch.no_grad()
def test_maps_of_the_tower_are_those_of_clip_but_for_the_last_block_which_does_not_run(ours, theirs, pixels):
    with attention_maps() as maps:
        ours.vision(pixels)
    expected = theirs.model.vision_tower(pixels, output_attentions=True).attentions
    assert len(maps) == 1 and len(expected) == 3
    same(maps[0], expected[:2])


@torch.no_grad()
def test_maps_of_decoding_are_theirs_at_every_step(ours, theirs):
    ids = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(2))
    cache, their_cache = Cache(ours.language.config, 2, 12, ids.device, torch.float32), transformers.DynamicCache()
    for piece in ids.split([6, 1, 1, 3, 1], dim=1):
        with attention_maps() as maps:
            ours.language(piece, cache)
        decoder = theirs.model.language_model
        expected = decoder(input_ids=piece, past_key_values=their_cache, use_cache=True, output_attentions=True)
        same(maps[0], expected.attentions)


@torch.no_grad()
def test_what_an_answer_looked_at_is_what_theirs_looked_at_as_it_was_generated(ours, theirs, pixels):
    (answer,) = generate(ours, [PROMPT], pixels, Sampling(max_new_tokens=6))
    ids = widened(PROMPT)
    made = theirs.generate(
        input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6,
        eos_token_id=None, pad_token_id=0, output_attentions=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert made.sequences[0, -6:].tolist() == answer.ids
    found = patch_attention(ours, PROMPT, answer.ids, pixels)
    assert found.shape == (6, 2, 2, 4, SIDE, SIDE)
    for token, layers in enumerate(made.attentions):  # of each step, those of each layer, (1, H, queries, keys)
        for image, first in enumerate((2, 2 + N + 1)):
            expected = [layer[0, :, -1, first : first + N].unflatten(1, (SIDE, SIDE)) for layer in layers]
            torch.testing.assert_close(found[token, image], torch.stack(expected), rtol=1e-4, atol=1e-6)
