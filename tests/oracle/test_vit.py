"""The image tower gives the numbers of transformers' CLIPVisionModel, and takes its weights by their official names."""

import pytest
import torch

from nanollava.vit import VisionConfig, VisionTransformer

transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install .[oracle]")

TOLERANCE = 2e-5  # relative, float32: roundings of 1e-7 through a few blocks
SIZES = {
    "image_size": 28,
    "patch_size": 7,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def ours_and_theirs(**sizes):
    """Two towers with one set of random weights, the norms' and biases too: at 1 and 0 they would prove nothing."""
    torch.manual_seed(0)
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**{**SIZES, **sizes})).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    official = {name.removeprefix("vision_model."): tensor for name, tensor in theirs.state_dict().items()}
    renamed = {name.removeprefix("encoder."): t for name, t in official.items() if not name.endswith("position_ids")}
    ours = VisionTransformer(VisionConfig(**{**SIZES, **sizes}))
    ours.load_state_dict(renamed)  # strict: every official name is one of ours, and the other way round
    return ours.eval(), theirs


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_every_hidden_state_is_that_of_clip(eps):
    ours, theirs = ours_and_theirs(layer_norm_eps=eps)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True)
        assert len(expected.hidden_states) == 5
        for layer, state in enumerate(expected.hidden_states):
            assert error(ours.hidden_state(pixels, layer), state) < TOLERANCE, layer
        assert error(ours(pixels), expected.hidden_states[-2][:, 1:]) < TOLERANCE
        assert error(ours.pooled(pixels), expected.pooler_output) < TOLERANCE


def test_gradients_are_those_of_clip():
    ours, theirs = ours_and_theirs()
    pixels = torch.randn(2, 3, 28, 28, requires_grad=True)
    weights = torch.randn(2, 16, 48)
    expected = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    (expected,) = torch.autograd.grad((expected * weights).sum(), pixels)
    (found,) = torch.autograd.grad((ours(pixels) * weights).sum(), pixels)
    assert error(found, expected) < TOLERANCE


def test_defaults_are_those_of_clip():
    """A config of an official folder lists only what differs from them."""
    theirs = transformers.CLIPVisionConfig()
    assert all(getattr(theirs, name) == value for name, value in vars(VisionConfig()).items())
