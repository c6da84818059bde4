"""int8 weights: what is stored, what is computed with them, and what it costs."""

import copy

import pytest
import torch
from torch import nn

import nanollava
from nanollava.attention import can_compile
from nanollava.error import Error
from nanollava.llama import Llama, LlamaConfig
from nanollava.llava import Batch, Llava, LlavaConfig
from nanollava.quantize import Int8Linear, quantize
from nanollava.vit import VisionConfig

VISION = VisionConfig(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
LANGUAGE = LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def linear(rows: list[list[float]], dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows, dtype=dtype)
    return layer


def widened(layer: Int8Linear) -> torch.Tensor:
    return layer.q.double() * layer.scale.double()[:, None]


def test_a_row_by_hand():
    layer = Int8Linear(linear([[127.0, -63.6, 0.4, 0.0], [-0.254, 0.1, 0.002, 0.001], [0.0, 0.0, 0.0, 0.0]]))
    assert layer.q.tolist() == [[127, -64, 0, 0], [-127, 50, 1, 0], [0, 0, 0, 0]]  # 0.001 / 0.002 to the even
    assert layer.scale[:2].tolist() == pytest.approx([1.0, 0.002])
    assert layer(torch.ones(1, 4)).tolist()[0] == pytest.approx([63.0, -0.152, 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_weight_is_off_by_more_than_half_a_step(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, bias=False, dtype=dtype)
    found = Int8Linear(layer)
    step = layer.weight.detach().double().abs().amax(dim=1, keepdim=True) / 127
    assert ((widened(found) - layer.weight.double()).abs() <= 0.5001 * step).all()  # the step is rounded to float32
    assert found.q.dtype == torch.int8 and found.scale.dtype == torch.float32


@pytest.mark.skipif(not can_compile("cpu"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("value", [0.5, 3e-6])
def test_float16_neither_overflows_nor_vanishes(value):
    layer = Int8Linear(linear([[value] * 1024], torch.float16))
    x, expected = torch.ones(1, 1, 1024, dtype=torch.float16), torch.tensor(value, dtype=torch.float16).item() * 1024
    with torch.inference_mode():
        for run in (layer, torch.compile(layer)):
            assert run(x).item() == pytest.approx(expected, rel=2e-3)


def test_it_has_no_loss():
    model = quantize(Llava(LlavaConfig(VISION, LANGUAGE)))
    ids = torch.zeros(1, 4, dtype=torch.long)
    batch = Batch(ids, ids, ids - 1, torch.arange(4)[None], ids, ids, None)
    with pytest.raises(Error, match="int8 weights can only answer: train"):
        model.loss(batch)


def test_every_matrix_of_the_decoder_is_replaced_and_nothing_else():
    torch.manual_seed(0)
    model = Llava(LlavaConfig(VISION, LANGUAGE))
    tower, projector = copy.deepcopy(model.vision.state_dict()), copy.deepcopy(model.projector.state_dict())
    assert quantize(model) is model
    left = {type(module) for module in model.language.modules()}
    assert nn.Linear not in left and nn.Embedding in left
    assert sum(isinstance(module, Int8Linear) for module in model.language.modules()) == 2 * 7 + 1
    for before, module in ((tower, model.vision), (projector, model.projector)):
        assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_logits_are_those_of_a_model_with_the_rounded_weights():
    torch.manual_seed(0)
    model = Llava(LlavaConfig(VISION, LANGUAGE))
    rounded = Llama(LANGUAGE).double()
    ids = torch.randint(400, (2, 11))
    rounded.load_state_dict(model.language.state_dict())
    quantize(model)
    for name, module in model.language.named_modules():
        if isinstance(module, Int8Linear):
            rounded.get_submodule(name).weight.data = widened(module)
    torch.testing.assert_close(model.language(ids).double(), rounded(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not can_compile("cpu"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("rows", [1, 3])
def test_compiled_it_gives_the_same(rows):
    torch.manual_seed(0)
    layer, x = Int8Linear(nn.Linear(64, 48, bias=False)), torch.randn(rows, 1, 64)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(layer)(x), layer(x), rtol=1e-5, atol=1e-5)


def test_int8_weights_are_not_saved(tmp_path):
    from nanollava.checkpoint import save

    model = quantize(Llava(LlavaConfig(VISION, LANGUAGE)))
    with pytest.raises(Error, match="int8 weights can only answer: train, save or convert the model before"):
        save(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_the_bundled_miniature_still_answers():
    import chat

    model = quantize(nanollava.load(chat.MINIATURE))
    assert model.answer(chat.SAMPLE, "Where is the heart?") == "The heart is small, red and at the top."
