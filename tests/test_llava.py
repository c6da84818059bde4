"""The three parts joined: splicing worked by hand, batches that equal their rows, the loss of packed rows."""

import pytest
import torch
import torch.nn.functional as F

from nanollava.conversation import IGNORE
from nanollava.error import Error
from nanollava.llama import LlamaConfig
from nanollava.llava import NO_PATCH, Batch, Llava, LlavaConfig, Spliced, pad, splice
from nanollava.tokenizer import IMAGE_TOKEN_ID as IMAGE
from nanollava.vit import VisionConfig

N = 4  # patches of an image
VISION = VisionConfig(16, 8, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3)
LANGUAGE = LlamaConfig(50, 32, 48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)

# Three records of different lengths, the one in the middle without an image.
ROWS = [[1, 7, IMAGE, 8, 9], [1, 11, 12, 13, 14, 15, 16, 17], [1, IMAGE, 20, 21, 22, 23]]


def llava(projector: str = "mlp2x_gelu", max_length: int = 64) -> Llava:
    torch.manual_seed(0)
    return Llava(LlavaConfig(VISION, LANGUAGE, projector, max_length=max_length)).eval()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the order in which float32 numbers of size one are summed."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- splice


def test_splicing_worked_by_hand():
    """Two images of three patches between words: patches count 0 to 5, image positions never carry loss."""
    found = splice([1, IMAGE, 5, IMAGE, 6], [IGNORE, IGNORE, 5, 99, 6], num_patches=3)
    assert found == Spliced(
        token_ids=[1, IMAGE, IMAGE, IMAGE, 5, IMAGE, IMAGE, IMAGE, 6],
        labels=[IGNORE, IGNORE, IGNORE, IGNORE, 5, IGNORE, IGNORE, IGNORE, 6],
        patches=[NO_PATCH, 0, 1, 2, NO_PATCH, 3, 4, 5, NO_PATCH],
    )


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 100])
def test_it_cuts_after_widening(length):
    whole = splice([1, IMAGE, 5, IMAGE, 6], [IGNORE, IGNORE, 5, IGNORE, 6], num_patches=3)
    cut = splice([1, IMAGE, 5, IMAGE, 6], [IGNORE, IGNORE, 5, IGNORE, 6], num_patches=3, max_length=length)
    assert cut == Spliced(*(column[:length] for column in whole)) and len(cut.labels) == min(length, 9)


def test_the_official_size_is_cut_to_2048_positions():
    """1,500 words behind an image of 576 patches: 2,077 positions, of which the last 29 words are lost."""
    token_ids = [1, IMAGE, *range(1000, 2500)]
    spliced = splice(token_ids, token_ids, num_patches=576, max_length=2048)
    assert [len(column) for column in spliced] == [2048] * 3
    assert spliced.token_ids[577:] == spliced.labels[577:] == list(range(1000, 2471))
    assert spliced.patches[1:577] == list(range(576))


def test_text_without_images_is_left_as_it_is():
    assert splice([1, 2, 3], [IGNORE, 2, 3], num_patches=9) == ([1, 2, 3], [IGNORE, 2, 3], [NO_PATCH] * 3)


def test_labels_of_another_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        splice([1, 2, 3], [1, 2], num_patches=9)


def test_padding_goes_behind_or_where_asked_in_front():
    assert pad([[1, 2, 3], [4]], -7).tolist() == [[1, 2, 3], [4, -7, -7]]
    assert pad([[1, 2, 3], [4]], -7, left=True).tolist() == [[1, 2, 3], [-7, -7, 4]]


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_image_tokens_stand_where_the_placeholder_stood(projector):
    """The sequence put together by hand from tower, projector and embedding."""
    model, pixels = llava(projector), images(2)
    first, second = model.projector(model.vision(pixels))
    word = model.language.embed_tokens.weight
    by_hand = torch.cat([word[[1, 7]], first, word[[8]], second, word[[9, 10]]])[None]
    expected = model.language.lm_head(model.language.hidden(by_hand))
    found = model(ids([1, 7, IMAGE, 8, IMAGE, 9, 10]), pixels)
    assert found.shape == (1, 5 + 2 * N, 50)
    close(found, expected)


def test_the_layer_is_the_one_the_config_names():
    model, pixels = llava(), images(1)
    model.config.select_layer = -1
    close(model.image_tokens(pixels), model.projector(model.vision.hidden_state(pixels, 2)[:, 1:]))


def test_text_alone_is_the_language_model_alone():
    model, text = llava(), ids(ROWS[1])
    assert torch.equal(model(text), model.language(text))


def test_every_token_and_every_image_matters_but_only_for_what_comes_after():
    model, pixels = llava(), images(2)
    text = ids([1, IMAGE, 5, 6, IMAGE, 7])
    before = model(text, pixels)
    pixels[1] += 1
    changed = (model(text, pixels) - before).abs().amax(-1)[0] > 1e-4
    assert changed.tolist() == [False] * (3 + N) + [True] * (N + 1)


def batch_of_rows(model: Llava, pixels: torch.Tensor):
    """The logits of ROWS in one padded batch, each without its padding."""
    lengths = torch.tensor([len(row) for row in ROWS])
    logits = model(pad(ROWS, 0), pixels, lengths)
    return [logits[i, : len(row) + (N - 1) * row.count(IMAGE)] for i, row in enumerate(ROWS)]


def rows_alone(model: Llava, pixels: torch.Tensor):
    which = [pixels[:1], None, pixels[1:]]
    return [model(ids(row), image)[0] for row, image in zip(ROWS, which, strict=True)]


def test_a_batch_of_image_text_image_equals_its_rows_alone():
    model, pixels = llava(), images(2)
    for together, alone in zip(batch_of_rows(model, pixels), rows_alone(model, pixels), strict=True):
        close(together, alone)


def test_a_batch_has_the_gradients_of_its_rows_alone():
    model = llava().double()
    model.vision.layers[-1].requires_grad_(False)  # unused, as is the norm behind it
    model.vision.post_layernorm.requires_grad_(False)
    pixels = images(2).double().requires_grad_()
    inputs = [pixels, *(p for p in model.parameters() if p.requires_grad)]
    gradients = []
    for logits in (batch_of_rows(model, pixels), rows_alone(model, pixels)):
        draw = torch.Generator().manual_seed(2)
        total = sum((row * torch.randn(row.shape, generator=draw)).sum() for row in logits)
        gradients.append(torch.autograd.grad(total, inputs))
    assert gradients[1][0].abs().amax((1, 2, 3)).min() > 0.01  # both images count
    for together, alone in zip(*gradients, strict=True):
        # float64, but norms and angles are computed in float32 always
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_rows_are_cut_after_widening_and_images_stay_with_their_rows():
    """Row 0 loses its second image whole; row 1 must still get the third one."""
    rows = [[1, IMAGE, 5, 6, 7, 8, IMAGE], [1, IMAGE, 30, 31, 32, 33, 34]]
    model, pixels = llava(max_length=8), images(3)
    found = model(ids(*rows), pixels)
    assert found.shape == (2, 8, 50)
    close(found[0], llava()(ids([1, IMAGE, 5, 6, 7]), pixels[:1])[0])
    close(found[1], llava()(ids([1, IMAGE, 30, 31, 32]), pixels[2:])[0])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_images_than_placeholders_is_an_error_with_both_numbers(count):
    pixels = images(count) if count else None
    with pytest.raises(Error, match=f"2 <image> placeholders but {count} images"):
        llava()(ids([1, IMAGE, 5, IMAGE]), pixels)


def test_placeholders_behind_the_length_of_a_row_are_padding():
    model = llava()
    found = model(ids([1, IMAGE, 5, IMAGE]), images(1), torch.tensor([3]))
    close(found, model(ids([1, IMAGE, 5]), images(1)))


def test_pixels_are_taken_in_the_type_of_the_weights():
    model = llava().bfloat16()
    assert model(ids(ROWS[0]), images(1)).dtype == torch.bfloat16


# ---------------------------------------------------------------- loss


def packed_by_hand(pixels: torch.Tensor) -> Batch:
    """One row: <s> image (shared), branch 1 `20 21`, branch 2 `30 31 32`; another document `<s> 40 41`; padding.

    The last patch belongs to the branches, because the first word of a branch may be predicted from it.
    """
    i = IGNORE
    shared, patch, no = [1, *[IMAGE] * (N - 1)], [N - 1], NO_PATCH
    row = {
        "token_ids": [*shared, IMAGE, 20, 21, IMAGE, 30, 31, 32, 1, 40, 41, 0, 0],
        "labels": [i, i, i, i, i, 20, 21, i, i, 31, 32, i, i, 41, i, i],
        "patches": [no, 0, 1, 2, *patch, no, no, *patch, no, no, no, no, no, no, no, no],
        "positions": [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 0, 1, 2, 0, 0],
        "documents": [0] * 11 + [1] * 3 + [-1] * 2,
        "branches": [0] * 4 + [1] * 3 + [2] * 4 + [0] * 5,
    }
    return Batch(**{name: torch.tensor([values]) for name, values in row.items()}, pixels=pixels)


def summed_loss(logits: torch.Tensor, labels: list[int]) -> torch.Tensor:
    """Minus the log-probability of each label at the position in front of it."""
    log_probabilities = F.log_softmax(logits[0], dim=-1)
    return -sum(log_probabilities[t - 1, label] for t, label in enumerate(labels) if label != IGNORE)


def test_the_loss_of_a_packed_row_is_that_of_its_records():
    model, pixels, i = llava(), images(1), IGNORE
    records = [
        (model(ids([1, IMAGE, 20, 21]), pixels), [i] * 5 + [20, 21]),
        (model(ids([1, IMAGE, 30, 31, 32]), pixels), [i] * 6 + [31, 32]),
        (model(ids([1, 40, 41])), [i, i, 41]),
    ]
    expected = sum(summed_loss(logits, labels) for logits, labels in records)
    torch.testing.assert_close(model.loss(packed_by_hand(pixels)), expected, rtol=1e-5, atol=0)


def test_a_row_without_targets_loses_nothing():
    batch = packed_by_hand(images(1))
    batch.labels.fill_(IGNORE)
    assert llava().loss(batch).item() == 0


def test_padding_has_no_part_in_loss_or_gradients():
    model = llava()
    batch, other = packed_by_hand(images(1)), packed_by_hand(images(1))
    other.token_ids[batch.documents == -1] = 49
    gradients = []
    for one in (batch, other):
        loss = model.loss(one)
        gradients.append([loss, *torch.autograd.grad(loss, model.parameters(), allow_unused=True)])
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_a_batch_moves_whole_with_or_without_pixels():
    batch = packed_by_hand(images(1)).to(torch.device("meta"))
    assert all(value.is_meta for value in vars(batch).values())
    assert packed_by_hand(None).to(torch.device("meta")).pixels is None
