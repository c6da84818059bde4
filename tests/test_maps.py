"""Attention maps: the equation's weights, layer by layer, of whatever passes through the network while they are asked
for; and which patches the tokens of an answer looked at."""

import math
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanollava import checkpoint
from nanollava.attention import Mask, attention, attention_maps
from nanollava.conversation import IGNORE, encode
from nanollava.error import Error
from nanollava.generate import Sampling, generate, pixels_of
from nanollava.llama import Cache, LlamaConfig
from nanollava.llava import NO_PATCH, Batch, Llava, LlavaConfig
from nanollava.maps import patch_attention
from nanollava.tokenizer import IMAGE_TOKEN_ID as IMAGE
from nanollava.train.blocks import prepare_blocks
from nanollava.vit import VisionConfig

SIDE, N = 3, 9  # patches along a side, and of an image
LAYERS, HEADS, E = 2, 4, 8  # of the decoder
CPU = torch.device("cpu")
WEIGHTS = Path(__file__).parents[1] / "weights/miniature"


@pytest.fixture
def model() -> Llava:
    """Random weights, three blocks in the tower, of which LLaVA runs two."""
    torch.manual_seed(0)
    vision = VisionConfig(SIDE * 8, 8, 24, 40, 3, 3)
    model = Llava(LlavaConfig(vision, LlamaConfig(50, HEADS * E, 48, LAYERS, HEADS, 2, max_position_embeddings=200)))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=1 if "q_proj" in name else 0.3)  # no two weights of a map are alike
    return model.eval()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, SIDE * 8, SIDE * 8, generator=torch.Generator().manual_seed(1))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # float32 sums in another order


def decoder_maps(model: Llava, *inputs: torch.Tensor) -> torch.Tensor:
    """(layers, B, H, T, T) of one forward pass of the whole."""
    with attention_maps() as maps, torch.no_grad():
        model(*inputs)
    return torch.stack(maps[-1])


# ---------------------------------------------------------------- the maps of forward passes


def test_the_towers_pass_comes_before_the_decoders_and_each_layer_has_its_map(model):
    token_ids, pixels = torch.tensor([[1, IMAGE, 5, 6], [1, 7, IMAGE, 8]]), images(2)
    with torch.no_grad():
        expected = model(token_ids, pixels)
        with attention_maps() as maps:
            found = model(token_ids, pixels)
    close(found, expected)
    shapes = [[tuple(layer.shape) for layer in layers] for layers in maps]
    assert shapes == [[(2, 3, 10, 10)] * 2, [(2, HEADS, 12, 12)] * LAYERS]
    tower, decoder = (torch.stack(layers) for layers in maps)
    close(tower.sum(-1), torch.ones(2, 2, 3, 10))
    close(decoder.sum(-1), torch.ones(LAYERS, 2, HEADS, 12))
    assert tower.min() > 0 and (decoder.triu(1) == 0).all()


def test_the_first_layers_map_is_the_equation_with_queries_and_keys_turned_as_complex_numbers(model):
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    layer, config = model.language.layers[0], model.language.config
    x = model.language.embed_tokens.weight[ids[0]]
    x = layer.input_layernorm.weight * x / (x.pow(2).mean(1, keepdim=True) + config.rms_norm_eps).sqrt()
    speed = torch.tensor([config.rope_theta ** (-2 * i / E) for i in range(E // 2)])

    def turned(weight: torch.Tensor, head: int, position: int) -> torch.Tensor:
        vector = (weight @ x[position]).view(-1, E)[head]
        pairs = torch.complex(vector[: E // 2], vector[E // 2 :])
        return pairs * torch.polar(torch.ones(E // 2), position * speed)

    found = decoder_maps(model, ids)[0, 0]
    for head in range(HEADS):
        for i in range(8):
            q = turned(layer.self_attn.q_proj.weight, head, i)
            keys = [turned(layer.self_attn.k_proj.weight, head // 2, j) for j in range(i + 1)]
            scores = torch.stack([(q * k.conj()).real.sum() for k in keys]) / math.sqrt(E)
            close(found[head, i], F.pad(scores.softmax(0), (0, 7 - i)))


def test_every_step_with_a_cache_is_a_pass_of_its_own_and_gives_the_rows_of_the_whole(model):
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(2))
    whole = decoder_maps(model, ids)
    cache = Cache(model.language.config, 2, 9, CPU, torch.float32)
    with attention_maps() as maps, torch.no_grad():
        for piece in ids.split([4, 1, 3, 1], dim=1):
            model.language(piece, cache)
    assert [len(layers) for layers in maps] == [LAYERS] * 4
    for layers, start, end in zip(maps, (0, 4, 5, 8), (4, 5, 8, 9), strict=True):
        close(torch.stack(layers), whole[:, :, :, start:end, :end])


def test_answers_of_a_batch_padded_on_the_left_look_as_each_alone(model):
    prompts, pixels, sampling = [[1, IMAGE, 5], [1, 7, 8, 9, IMAGE, 3, 4]], images(2), Sampling(max_new_tokens=3)
    with attention_maps() as maps:
        answers = generate(model, prompts, pixels, sampling)
    assert len(maps) == 1 + 3  # the tower, the prompts, two more tokens: the third is not read
    for row, padding in enumerate((4, 0)):
        with attention_maps() as alone:
            (answer,) = generate(model, prompts[row : row + 1], pixels[row : row + 1], sampling)
        assert answer.ids == answers[row].ids
        for together, single in zip(maps[1:], alone[1:], strict=True):
            together, single = (torch.stack(layers) for layers in (together, single))
            own = together[:, row : row + 1]
            close(own[..., -single.shape[3] :, padding:], single)
            assert (own[..., -single.shape[3] :, :padding] == 0).all()


@pytest.fixture
def packed() -> Batch:
    """A row of two documents and padding: an image that two questions share, then words alone."""
    columns = {
        "token_ids": [1] + [IMAGE] * N + [5, 6, 7, 8, 9] + [1, 11, 12, 13] + [0, 0],
        "labels": [IGNORE] * (1 + N) + [IGNORE, 6, 7, IGNORE, 9] + [IGNORE, 11, 12, 13] + [IGNORE] * 2,
        "patches": [NO_PATCH, *range(N)] + [NO_PATCH] * 11,
        "positions": [*range(1 + N), 10, 11, 12, 10, 11, *range(4), 0, 0],
        "documents": [0] * (1 + N + 5) + [1] * 4 + [-1] * 2,
        "branches": [0] * (1 + N) + [1, 1, 1, 2, 2] + [1] * 4 + [0] * 2,
    }
    return Batch(**{name: torch.tensor([column]) for name, column in columns.items()}, pixels=images(1))


def test_records_of_a_packed_row_look_as_each_alone(model, packed):
    with attention_maps() as maps, torch.no_grad():
        model.loss(packed)
    row = torch.stack(maps[1])[:, 0]  # (layers, H, T, T)
    shared = list(range(1 + N))
    records = {  # the positions of each in the row, and what it is by itself
        (*shared, 10, 11, 12): ([[1, IMAGE, 5, 6, 7]], images(1)),
        (*shared, 13, 14): ([[1, IMAGE, 8, 9]], images(1)),
        (15, 16, 17, 18): ([[1, 11, 12, 13]], None),
    }
    for places, (ids, pixels) in records.items():
        alone = decoder_maps(model, torch.tensor(ids), pixels)[:, 0]
        for i, place in enumerate(places):
            close(row[:, :, place, list(places)], alone[:, :, i])
            elsewhere = [p for p in range(21) if p not in places]
            assert (row[:, :, place, elsewhere] == 0).all()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradients_of_a_loss_are_the_same_and_backward_adds_no_map(model, packed, recompute):
    prepare_blocks(model.language, recompute, compiled=False)
    expected = torch.autograd.grad(model.loss(packed), list(model.language.layers.parameters()))
    with attention_maps() as maps:
        loss = model.loss(packed)
    found = torch.autograd.grad(loss, list(model.language.layers.parameters()))
    assert [len(layers) for layers in maps] == [2, LAYERS]
    assert not any(m.requires_grad for layers in maps for m in layers)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- when they are asked for


def asked_for(maps: list) -> bool:
    """Whether a pass that begins now adds to these maps; a decoder's, without the decoder."""
    before, q = len(maps), torch.ones(1, 1, 2, 4)
    attention(Mask(), 1, 2, 2, CPU)(q, q, q)
    return len(maps) == before + 1 and maps[-1][0].tolist() == [[[[1, 0], [0.5, 0.5]]]]


def test_whatever_ends_the_block_maps_are_asked_for_no_longer():
    with pytest.raises(KeyError), attention_maps() as maps:
        assert asked_for(maps)
        raise KeyError
    assert not asked_for(maps) and len(maps) == 1
    assert attention(Mask(), 1, 2, 2, CPU).func is F.scaled_dot_product_attention


def test_of_two_blocks_the_inner_one_gets_the_maps():
    with attention_maps() as outer:
        with attention_maps() as inner:
            assert asked_for(inner) and not asked_for(outer)
        assert asked_for(outer) and not asked_for(inner)
    assert (len(inner), len(outer)) == (2, 2)


def test_other_threads_are_not_watched():
    def elsewhere() -> None:
        found.append(asked_for(maps))
        with attention_maps() as own:
            found.append(asked_for(own))

    found = []
    with attention_maps() as maps:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert found == [False, True] and asked_for(maps)


def test_an_execution_that_was_chosen_stays_as_it_was():
    with attention_maps() as maps:
        assert attention(Mask(), 1, 2, 2, CPU, how="sdpa").func is F.scaled_dot_product_attention
    assert maps == []


@pytest.mark.parametrize("order", [(False, True, False), (True, False, True)])
def test_a_compiled_decoder_sees_that_they_are_asked_for(model, order):
    """All of it in one graph, as a decoding step is compiled; with a compiler that only records."""
    torch._dynamo.reset()
    hidden = torch.compile(model.language.hidden, fullgraph=True, backend=lambda graph, _: graph.forward)
    x = torch.randn(1, 6, HEADS * E, generator=torch.Generator().manual_seed(3))
    for ask in order:
        with torch.no_grad(), attention_maps() as expected:
            model.language.hidden(x)
        if ask:
            with torch.no_grad(), attention_maps() as maps:
                hidden(x)
            close(torch.stack(maps[0]), torch.stack(expected[0]))
        else:
            with torch.no_grad():
                close(hidden(x), model.language.hidden(x))


# ---------------------------------------------------------------- what the tokens of an answer looked at


PROMPT = [1, 7, IMAGE, 5, IMAGE, 9]  # with its images widened 4 + 2 * N positions


def test_where_all_is_looked_at_alike_each_token_looks_at_its_share(model):
    """By hand: without queries every key weighs the same. The token chosen at position p sees p + 1 of them."""
    for layer in model.language.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    found = patch_attention(model, PROMPT, [20, 21, 22], images(2))
    assert found.shape == (3, 2, LAYERS, HEADS, SIDE, SIDE)
    for token in range(3):
        close(found[token], torch.full_like(found[token], 1 / (4 + 2 * N + token)))


def test_patches_lie_as_in_the_picture_and_tokens_follow_the_answer(model):
    answer, pixels = [20, 21, 22, 23], images(2)
    found = patch_attention(model, PROMPT, answer, pixels)
    whole = decoder_maps(model, torch.tensor([PROMPT + answer]), pixels)[:, 0]  # (layers, H, T, T)
    for token in range(4):
        chosen_at = 4 + 2 * N - 1 + token
        for image, first in enumerate((2, 2 + N + 1)):
            for row in range(SIDE):
                for column in range(SIDE):
                    expected = whole[:, :, chosen_at, first + SIDE * row + column]
                    close(found[token, image, :, :, row, column], expected)
    assert found.std() > 0.02 and not found.is_inference()


def test_it_is_what_generation_looked_at(model):
    pixels = images(2)
    with attention_maps() as maps:
        (answer,) = generate(model, [PROMPT], pixels, Sampling(max_new_tokens=5))
    assert len(answer.ids) == 5
    found = patch_attention(model, PROMPT, answer.ids, pixels)
    for token, layers in enumerate(maps[1:]):
        last = torch.stack(layers)[:, 0, :, -1]  # (layers, H, keys): the position that chose the token
        first, second = last[..., 2 : 2 + N], last[..., 3 + N : 3 + 2 * N]
        close(found[token, 0].flatten(2), first)
        close(found[token, 1].flatten(2), second)


@pytest.mark.parametrize(
    ("prompt", "answer", "count", "words"),
    [
        (PROMPT, [], 2, "the answer is empty"),
        ([1, 5], [20], 0, "the prompt has no <image>"),
        (PROMPT, [20], 0, "2 <image> placeholders but 0 images"),
        (PROMPT, [20], 1, "2 <image> placeholders but 1 images"),
        (PROMPT, [20, 50, 21], 2, "token id 50"),
    ],
)
def test_what_cannot_be_shown_is_one_line(model, prompt, answer, count, words):
    with pytest.raises(Error, match=words) as caught:
        patch_attention(model, prompt, answer, images(count) if count else None)
    assert "\n" not in str(caught.value)


def test_the_words_of_the_bundled_model_look_at_what_they_name():
    """The picture has a star at the top left, a heart at the top and a circle on the left, one patch each."""
    model = checkpoint.load(WEIGHTS)
    picture = pixels_of(model, WEIGHTS / "sample.png")
    question = [{"role": "user", "content": "<image>\nDescribe the picture in detail."}]
    prompt, _ = encode(question, model.tokenizer, model.config.template)
    (answer,) = generate(model, [prompt], picture)
    most = patch_attention(model, prompt, answer.ids, picture)[:, 0].mean((1, 2)).flatten(1).argmax(1)  # (tokens,)
    looks = {model.tokenizer.decode([token]): int(patch) for token, patch in zip(answer.ids, most, strict=True)}
    named = {"yellow": 0, "star": 0, "red": 1, "heart": 1, "blue": 3, "circle": 3}
    assert {word: looks[word] for word in named} == named
