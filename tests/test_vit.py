"""The image tower against its description: patches in reading order, the layer before the last, official sizes."""

import math

import pytest
import torch
from torch import nn

from nanollava.attention import Mask, attention
from nanollava.vit import VisionConfig, VisionTransformer, quick_gelu

TINY = VisionConfig(
    image_size=24,
    patch_size=8,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
)


def tower(config: VisionConfig = TINY) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(config).eval().requires_grad_(False)


def pixels(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("size", "parameters"), [(224, 303_179_776), (336, 303_507_456)])
def test_vit_large_has_the_tensors_and_parameters_of_the_official_weights(size, parameters):
    with torch.device("meta"):
        model = VisionTransformer(VisionConfig(size, 14, 1024, 4096, num_hidden_layers=24, num_attention_heads=16))
    tensors = model.state_dict()
    assert len(tensors) == 391 and sum(t.numel() for t in tensors.values()) == parameters
    positions = tensors["embeddings.position_embedding.weight"]
    assert tuple(positions.shape) == (1 + (size // 14) ** 2, 1024)


def test_quick_gelu_at_values_worked_by_hand():
    x = torch.tensor([0.0, 1.0, -1.0, 2.0])
    expected = [v / (1 + math.exp(-1.702 * v)) for v in x.tolist()]  # 0, 0.8458, -0.1542, 1.9356
    torch.testing.assert_close(quick_gelu(x), torch.tensor(expected))
    assert abs(quick_gelu(torch.tensor(1.0)).item() - 0.8458) < 1e-4  # erf-GELU would give 0.8413


def test_patches_are_read_row_by_row():
    """Each patch, cut out by hand and multiplied with the kernel, stands at 1 + row * 3 + column behind the class."""
    model, image = tower(), pixels(1)
    found = model.embeddings(image)[0]
    positions = model.embeddings.position_embedding.weight
    torch.testing.assert_close(found[0], model.embeddings.class_embedding + positions[0])
    for row in range(3):
        for column in range(3):
            patch = image[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            vector = (model.embeddings.patch_embedding.weight * patch).sum((1, 2, 3))
            place = 1 + 3 * row + column
            torch.testing.assert_close(found[place], vector + positions[place], rtol=1e-5, atol=1e-5)


def test_the_features_are_the_output_of_the_last_block_but_one_without_class_token():
    """The blocks one after the other by hand, all but the last; nothing normalises what comes out."""
    model, images = tower(), pixels()
    x = model.pre_layrnorm(model.embeddings(images))
    attend = attention(Mask(causal=False), 2, 10, 10, x.device, how="plain")
    for block in model.layers[:2]:
        x = x + block.self_attn(block.layer_norm1(x), attend)
        x = x + block.mlp.fc2(quick_gelu(block.mlp.fc1(block.layer_norm2(x))))
    features = model(images)
    assert features.shape == (2, 9, 32)
    torch.testing.assert_close(features, x[:, 1:], rtol=1e-5, atol=1e-5)
    assert features.mean(-1).abs().max() > 0.01  # a LayerNorm of weight 1 and bias 0 would leave means of 0


def test_neither_the_last_block_nor_the_last_norm_touches_the_features():
    model, images = tower(), pixels()
    expected = model(images)
    for unused in (model.layers[-1], model.post_layernorm):
        for parameter in unused.parameters():
            parameter.fill_(math.nan)
    assert torch.equal(model(images), expected)


def test_hidden_states_count_from_both_ends():
    model, images = tower(), pixels()
    for layer in range(4):
        assert torch.equal(model.hidden_state(images, layer), model.hidden_state(images, layer - 4))
        assert torch.equal(model(images, layer), model.hidden_state(images, layer)[:, 1:])
    assert torch.equal(model.hidden_state(images, 0), model.pre_layrnorm(model.embeddings(images)))
    with pytest.raises(IndexError):
        model.hidden_state(images, 4)


def test_the_summary_of_an_image_is_the_normalised_class_token_of_the_last_block():
    model, images = tower(), pixels()
    norm: nn.LayerNorm = model.post_layernorm
    norm.weight.normal_()
    norm.bias.normal_()
    x = model.hidden_state(images, 3)[:, 0]
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(model.pooled(images), expected * norm.weight + norm.bias, rtol=1e-5, atol=1e-5)


def test_images_of_a_batch_do_not_see_each_other():
    model, images = tower(), pixels(3)
    for i in range(3):
        torch.testing.assert_close(model(images)[i], model(images[i : i + 1])[0], rtol=1e-5, atol=1e-5)


def test_every_patch_sees_every_other():
    """No causal mask: the last patch moves the features of the first."""
    model, images = tower(), pixels(1)
    changed = images.clone()
    changed[..., 16:, 16:] += 1
    assert ((model(changed) - model(images)).abs().amax(-1) > 1e-4).all()
