"""The whole gives the logits of transformers' LlavaForConditionalGeneration on images and text together."""

import pytest
import torch

from nanollava.llama import LlamaConfig
from nanollava.llava import Llava, LlavaConfig, pad
from nanollava.tokenizer import IMAGE_TOKEN_ID as IMAGE
from nanollava.vit import VisionConfig

transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install .[oracle]")

TOLERANCE = 2e-5  # relative, float32: roundings of 1e-7 through a few blocks
N = 4  # patches of an image
THEIR_IMAGE = 60  # the id of <image> in transformers, one of the vocabulary
VISION = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
}
LANGUAGE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
CONVERSATIONS = {
    "image first": [[1, IMAGE, 5, 6, 7]],
    "image in the middle": [[1, 8, 9, IMAGE, 5, 6]],
    "image last": [[1, 8, 9, IMAGE]],
    "several images": [[1, IMAGE, 5, IMAGE, IMAGE, 6, 7]],
    "rows of different lengths": [[1, 7, IMAGE, 8, 9], [1, IMAGE, 20]],
    "a text-only row between": [[1, 7, IMAGE, 8, 9], [1, 11, 12, 13, 14, 15, 16, 17], [1, IMAGE, 20, 21, IMAGE]],
}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def drawn(module):
    """The module with all weights at random, the norms' too: at 1 they would prove nothing."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


def tower_weights(theirs):
    """Official names of the tower, with or without their first part, as ours."""
    names = theirs.state_dict().items()
    return {name.removeprefix("vision_model.").removeprefix("encoder."): tensor for name, tensor in names}


def their_llava() -> "transformers.LlavaForConditionalGeneration":
    """The tiny model as transformers makes it."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**LANGUAGE),
        image_token_index=THEIR_IMAGE,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    return transformers.LlavaForConditionalGeneration(config)


def as_ours(theirs) -> Llava:
    """Our model with the weights of theirs."""
    model = Llava(LlavaConfig(VisionConfig(**VISION), LlamaConfig(**LANGUAGE), "mlp2x_gelu")).eval()
    model.vision.load_state_dict(tower_weights(theirs.model.vision_tower))
    projector = theirs.model.multi_modal_projector.state_dict().items()
    layers = {"linear_1": "0", "linear_2": "2"}
    model.projector.load_state_dict({layers[name[:8]] + name[8:]: tensor for name, tensor in projector})
    decoder = theirs.model.language_model.state_dict()
    model.language.load_state_dict(decoder | {"lm_head.weight": theirs.lm_head.weight})
    return model


@pytest.fixture(scope="module")
def theirs():
    return drawn(their_llava())


@pytest.fixture(scope="module")
def ours(theirs):
    return as_ours(theirs)


def their_inputs(rows: list[list[int]]):
    """transformers wants the image token repeated, and a mask for what is padded."""
    widened = [[t for token in row for t in ([THEIR_IMAGE] * N if token == IMAGE else [token])] for row in rows]
    return pad(widened, 0), pad([[1] * len(row) for row in widened], 0)


def pixels_for(rows: list[list[int]]) -> torch.Tensor:
    count = sum(row.count(IMAGE) for row in rows)
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rows", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_logits_are_those_of_llava(ours, theirs, rows):
    pixels, (token_ids, mask) = pixels_for(rows), their_inputs(rows)
    with torch.no_grad():
        expected = theirs(input_ids=token_ids, attention_mask=mask, pixel_values=pixels).logits
        found = ours(pad(rows, 0), pixels, torch.tensor([len(row) for row in rows]))
    assert error(found[mask.bool()], expected[mask.bool()]) < TOLERANCE


def test_gradients_are_those_of_llava(ours, theirs):
    """Of the pixels and of every part: what flows back passes all of them."""
    rows = CONVERSATIONS["a text-only row between"]
    token_ids, mask = their_inputs(rows)
    weights = torch.randn(*token_ids.shape, 64, generator=torch.Generator().manual_seed(2)) * mask[..., None]
    pixels = pixels_for(rows).requires_grad_()
    expected = theirs(input_ids=token_ids, attention_mask=mask, pixel_values=pixels).logits
    found = ours(pad(rows, 0), pixels, torch.tensor([len(row) for row in rows]))
    pairs = [
        (pixels, pixels),
        (ours.projector[0].weight, theirs.model.multi_modal_projector.linear_1.weight),
        (ours.language.embed_tokens.weight, theirs.model.language_model.embed_tokens.weight),
        (ours.vision.embeddings.class_embedding, theirs.model.vision_tower.embeddings.class_embedding),
    ]
    found = torch.autograd.grad((found * weights).sum(), [a for a, _ in pairs])
    expected = torch.autograd.grad((expected * weights).sum(), [b for _, b in pairs])
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) < 1e-4  # sums over all positions: more roundings


def test_the_papers_linear_projector_put_together_from_their_parts():
    """transformers has no linear LLaVA: its tower, one product, its decoder on the joined embeddings."""
    tower = drawn(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)))
    decoder = drawn(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LANGUAGE)))
    model = drawn(Llava(LlavaConfig(VisionConfig(**VISION), LlamaConfig(**LANGUAGE), "linear")))
    model.vision.load_state_dict(tower_weights(tower))
    model.language.load_state_dict({name.removeprefix("model."): t for name, t in decoder.state_dict().items()})
    pixels = pixels_for([[IMAGE]])
    with torch.no_grad():
        features = tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]  # (N, C)
        words = decoder.get_input_embeddings()(torch.tensor([1, 8, 5, 6]))
        image_tokens = features @ model.projector.weight.T + model.projector.bias
        joined = torch.cat([words[:2], image_tokens, words[2:]])[None]
        found = model(torch.tensor([[1, 8, IMAGE, 5, 6]]), pixels)
        assert error(found, decoder(inputs_embeds=joined).logits) < TOLERANCE
