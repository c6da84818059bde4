"""Generation: the cache, the padding and the streaming change nothing about what the network says."""

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nanollava import generate as generation
from nanollava.conversation import encode
from nanollava.error import Error
from nanollava.generate import Answer, Chat, Sampling, answer, generate, sample, stream
from nanollava.images import preprocess
from nanollava.llama import LlamaConfig
from nanollava.llava import Llava, LlavaConfig
from nanollava.tokenizer import IMAGE_TOKEN_ID, Tokenizer
from nanollava.vit import VisionConfig

VISION = VisionConfig(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
SIZES = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
I = IMAGE_TOKEN_ID


@pytest.fixture
def tokenizer(tiny_tokenizer_file) -> Tokenizer:
    return Tokenizer(tiny_tokenizer_file)


def random_model(tokenizer: Tokenizer | None = None, positions: int = 200, **settings) -> Llava:
    torch.manual_seed(0)
    language = LlamaConfig(**SIZES, **HEADS, max_position_embeddings=positions)
    model = Llava(LlavaConfig(VISION, language, **settings), tokenizer).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # larger than usual, so that what stands far back still changes the logits
            parameter.data.normal_(std=0.15)
    return model


def collect_logits(model: Llava) -> list[Tensor]:
    """The list that will receive the (B, V) logits of every step."""
    steps: list[Tensor] = []
    model.language.lm_head.register_forward_hook(lambda module, inputs, logits: steps.append(logits))
    return steps


def random_pixels(images: int, seed: int = 1) -> Tensor:
    return torch.randn(images, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the loop

PROMPT = [1, 50, 51, I, 60, 61, I, 70]
PROMPTS = [[1, 50, 51, 52, 53], [1, 50, I, 60], [1, I, 60, 61, I, 62, 63, 64], [1, 90], [1, 40, 41, I]]
IMAGES = [0, 1, 2, 0, 1]


def test_an_answer_ends_where_training_ended(tokenizer):
    model = random_model(tokenizer, max_length=20)
    (answer,) = generate(model, [[1, 50, 51]], None, Sampling(max_new_tokens=100))
    assert len(answer.ids) <= 17 and model.config.language.max_position_embeddings == 200
    with pytest.raises(Error, match="takes 20 positions"):
        generate(model, [[1] * 20], None, Sampling(max_new_tokens=100))


def test_cached_decoding_is_the_full_forward_pass():
    model, pixels = random_model(), random_pixels(2)
    steps = collect_logits(model)
    (found,) = generate(model, [PROMPT], pixels, Sampling(max_new_tokens=12))
    steps = torch.cat(steps)
    assert len(found.ids) == 12
    assert len(set(found.ids)) > 3, "a model that repeats itself would hide a wrong position"
    with torch.inference_mode():
        full = model(torch.tensor([PROMPT + found.ids]), pixels)[0]  # (T', V)
    torch.testing.assert_close(steps, full[-13:-1], rtol=0, atol=1e-5)
    assert full[-13:-1].argmax(-1).tolist() == found.ids


def test_a_batch_of_different_lengths_is_its_prompts_one_by_one():
    model, pixels = random_model(), random_pixels(sum(IMAGES))
    steps = collect_logits(model)
    sampling = Sampling(max_new_tokens=8)
    together = generate(model, PROMPTS, pixels, sampling)
    logits = torch.stack(steps, dim=1)  # (B, steps, V)
    for i, (prompt, own) in enumerate(zip(PROMPTS, pixels.split(IMAGES), strict=True)):
        steps.clear()
        (alone,) = generate(model, [prompt], own if len(own) else None, sampling)
        assert together[i].ids == alone.ids
        torch.testing.assert_close(logits[i : i + 1], torch.stack(steps, dim=1), rtol=0, atol=1e-5)
    assert len({tuple(found.ids) for found in together}) == len(PROMPTS)


def test_every_image_reaches_its_own_prompt():
    model, pixels = random_model(), random_pixels(sum(IMAGES))
    steps = collect_logits(model)
    first = [*generate(model, PROMPTS, pixels, Sampling(max_new_tokens=1)), steps.pop()][-1]
    pixels[2] = random_pixels(1, seed=5)[0]  # the second image of the third prompt
    generate(model, PROMPTS, pixels, Sampling(max_new_tokens=1))
    changed = (steps.pop() - first).abs().amax(dim=1) > 1e-5
    assert changed.tolist() == [False, False, True, False, False]


def test_the_loop_ends_with_its_longest_answer(scripted_model, tokenizer):
    eos = tokenizer.eos_id
    model = scripted_model([[50, 60, eos], [51, 70, 71, 72, eos], [52, eos]])
    steps = collect_logits(model)
    found = generate(model, [[1, 50], [1, 9, 9, 51], [1, 52]], None, Sampling(max_new_tokens=50))
    assert [answer.ids for answer in found] == [[60], [70, 71, 72], []]
    assert len(steps) == 4


def test_without_a_tokenizer_there_are_ids_but_no_text():
    model = random_model(None)
    (found,) = generate(model, [[1, 50]], None, Sampling(max_new_tokens=3))
    assert len(found.ids) == 3
    with pytest.raises(Error, match=r"no tokenizer.*tokenizer\.model"):
        _ = found.text
    with pytest.raises(Error, match="no tokenizer"):
        Chat(model)


def test_no_prompts_no_answers():
    assert generate(random_model(), []) == []


def test_answers_end_where_the_positions_end():
    model = random_model(positions=20)
    prompts = [[1] + [50] * 15, [1] + [50] * 9, [1, 50, I, 51]]  # 16, 10 and 7 positions: the image takes four
    found = generate(model, prompts, random_pixels(1))
    assert [len(answer.ids) for answer in found] == [4, 10, 13]
    assert found[0].ids == generate(model, prompts[:1])[0].ids
    (short,) = generate(model, prompts[:1], None, Sampling(max_new_tokens=3))
    assert len(short.ids) == 3


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [([50] * 20, 0, "20 positions"), ([I] * 5, 5, "20 positions"), ([], 0, "empty"), ([1, I], 2, "1 <image>")],
)
def test_prompts_that_cannot_be_continued(prompt, images, message):
    with pytest.raises(Error, match=message):
        generate(random_model(positions=20), [prompt], random_pixels(images) if images else None)


def test_generation_leaves_no_trace_in_the_model():
    model = random_model()
    generate(model, [PROMPT], random_pixels(2), Sampling(max_new_tokens=2))
    model(torch.tensor([[1, 50]])).sum().backward()  # would fail on tensors that were made for inference only
    assert model.language.lm_head.weight.grad is not None


# ---------------------------------------------------------------- sampling

LOGITS = torch.tensor([[2.0, 0.5, -1.0, 1.0, 0.0, 3.0], [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]])


def frequencies(sampling: Sampling, draws: int = 20_000) -> Tensor:
    """(B, V): how often each token was drawn."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([sample(LOGITS[b].expand(draws, -1), sampling, generator) for b in range(len(LOGITS))])
    return torch.nn.functional.one_hot(ids, LOGITS.shape[1]).float().mean(dim=1)


def test_greedy_and_top_1_take_the_most_likely():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(-1).tolist()
    assert sample(logits, Sampling()).tolist() == best
    assert sample(logits, Sampling(temperature=5.0, top_k=1)).tolist() == best
    assert sample(logits, Sampling(temperature=5.0, top_p=1e-9)).tolist() == best
    assert sample(10 * logits, Sampling(temperature=2e-38)).tolist() == best  # 10 / 2e-38 is too large for a float32
    assert sample(logits, Sampling(temperature=1e-320)).tolist() == best
    assert sample(logits, Sampling(temperature=1.0, top_p=1e-300)).tolist() == best
    assert sample(torch.zeros(1, 9), Sampling(temperature=1.0, top_k=1)).tolist() == [0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature):
    expected = (LOGITS / temperature).softmax(-1)
    torch.testing.assert_close(frequencies(Sampling(temperature)), expected, rtol=0, atol=0.015)


def allowed(logits: Tensor, top_p: float, top_k: int) -> set[int]:
    """By hand: of the top_k most likely, the fewest that together reach top_p."""
    order = logits.argsort(descending=True).tolist()[: top_k or None]
    p = logits[order].softmax(-1).tolist()
    kept, mass = set(), 0.0
    for token, share in zip(order, p, strict=True):
        if mass >= top_p:
            break
        kept.add(token)
        mass += share
    return kept


@pytest.mark.parametrize(("top_p", "top_k"), [(0.3, 0), (0.7, 0), (0.9, 0), (0.999, 0), (1.0, 2), (1.0, 99), (0.8, 3)])
def test_top_p_and_top_k_keep_what_they_should(top_p, top_k):
    found = frequencies(Sampling(1.0, top_p, top_k))
    for b in range(len(LOGITS)):
        kept = allowed(LOGITS[b], top_p, top_k)
        assert set(found[b].nonzero().flatten().tolist()) == kept
        p = torch.full_like(LOGITS[b], -torch.inf).index_put((torch.tensor(sorted(kept)),), LOGITS[b][sorted(kept)])
        torch.testing.assert_close(found[b], p.softmax(-1), rtol=0, atol=0.015)


def test_a_seed_draws_the_same_answer_again():
    model = random_model()

    def ids(seed: int | None) -> list[int]:
        return generate(model, [[1, 50]], None, Sampling(1.5, max_new_tokens=20, seed=seed))[0].ids

    assert ids(3) == ids(3)
    assert ids(3) != ids(4)
    assert ids(None) != ids(None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_p", 0.0),
        ("top_p", 1.5), ("top_k", -1), ("max_new_tokens", 0), ("seed", -1), ("seed", 2**64), ("seed", True),
        ("top_k", True), ("temperature", True), pytest.param("temperature", 10**400, id="above any float"),
    ],
)  # fmt: skip
def test_senseless_sampling_is_refused(field, value):
    with pytest.raises(Error, match=rf"^{field} is {value}"):
        Sampling(**{field: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_no_answer(value, temperature):
    logits = torch.zeros(2, 5, dtype=torch.float16)
    assert sample(logits, Sampling(temperature)).shape == (2,)
    logits[1, 3] = value
    with pytest.raises(Error, match="in float16: choose --dtype bfloat16 or float32"):
        sample(logits, Sampling(temperature))


@pytest.mark.parametrize(
    ("prompts", "pixels", "told"),
    [
        ([torch.tensor([1, 50])], None, "prompts: give a list of lists"),
        (torch.tensor([[1, 50]]), None, "prompts: give a list of lists"),
        ([1, 50], None, "prompts: give a list of lists"),
        ([[1, 50]], [torch.zeros(3, 16, 16)], "pixels: a list; give one tensor"),
    ],
)
def test_what_looks_much_like_tokens_or_pixels_is_refused(prompts, pixels, told):
    with pytest.raises(Error, match=told):
        generate(random_model(), prompts, pixels)


# ---------------------------------------------------------------- text


def grow(tokenizer: Tokenizer, ids: list[int], stop: str | None = None) -> list[str]:
    """The texts of an answer as its tokens come."""
    answer, texts = Answer(tokenizer, stop, room=len(ids)), [""]
    for token in ids:
        answer.add(token)
        texts.append(answer.text)
        assert texts[-1].startswith(texts[-2]), "what was shown must not change"
    return texts


def test_characters_never_appear_in_halves(tokenizer):
    text = "naïve 中文 😀 é"
    ids = tokenizer.encode(text, bos=False)
    assert len(ids) > len(text) + 8, "its characters must be spread over several tokens"
    texts = grow(tokenizer, ids)
    assert texts[-1] == text
    assert all("\ufffd" not in part for part in texts)
    assert "naïve 中" in texts


def test_an_unfinished_character_at_the_end_is_left_out(tokenizer):
    ids = tokenizer.encode("a 中", bos=False)
    assert grow(tokenizer, ids[:-1])[-1] == "a"


def test_bytes_that_never_become_a_character_do_not_hold_up_the_rest(tokenizer):
    ids = tokenizer.encode("a 中", bos=False)[:-1] + tokenizer.encode("ball", bos=False)
    assert grow(tokenizer, ids)[-1].endswith("ball")


def hashes(tokenizer: Tokenizer) -> list[int]:
    """### as models write it: two tokens."""
    ids = tokenizer.encode("blue.###", bos=False)[-2:]
    assert [tokenizer.decode([i]) for i in ids] == ["##", "#"]
    return ids


def test_the_stop_text_ends_an_answer_and_is_never_shown(tokenizer):
    words, more = tokenizer.encode("The ball is blue.", bos=False), tokenizer.encode("Human: Why", bos=False)
    ids = words + hashes(tokenizer) + more
    answer = Answer(tokenizer, "###", room=100)
    for token in ids:
        answer.add(token)
    assert answer.done
    assert answer.text == "The ball is blue."
    assert answer.ids == ids[: len(words) + 2], "nothing behind the stop text belongs to the answer"
    assert not any("#" in text for text in grow(tokenizer, ids, "###"))


def test_the_stop_text_as_official_models_write_it(llama_tokenizer_file):
    tokenizer = Tokenizer(llama_tokenizer_file)
    words = tokenizer.encode("A cat.", bos=False)
    texts = grow(tokenizer, [*words, 2277, 29937, 12968], "###")  # ##, # and " Human"
    assert texts[-1] == texts[len(words)] == "A cat."
    assert grow(tokenizer, [*words, 835, 12968], "###")[-1] == "A cat."  # one token with its space: " ###"
    assert grow(tokenizer, [*words, 2277, 12968], "###")[-1] == "A cat.## Human"


def test_what_only_began_like_the_stop_text_is_shown(tokenizer):
    double = hashes(tokenizer)[:1]
    word = tokenizer.encode("blue", bos=False)[1:]
    texts = grow(tokenizer, tokenizer.encode("A", bos=False) + double + word, "###")
    assert [text.count("#") for text in texts] == [0] * 3 + [2] * len(word)
    assert grow(tokenizer, tokenizer.encode("A", bos=False) + double, "###")[-1] == "A##"  # ended without more tokens


def test_space_is_shown_only_between_words(tokenizer):
    texts = grow(tokenizer, tokenizer.encode("\n\n  A\n\n ball \n", bos=False))
    assert texts[-1] == "A\n\n ball"
    assert all(text == text.strip() for text in texts)


def test_the_end_token_ends_an_answer(tokenizer):
    answer = Answer(tokenizer, None, room=100)
    for token in [*tokenizer.encode("A ball", bos=False), tokenizer.eos_id, 50]:
        answer.add(token)
    assert answer.done
    assert answer.text == "A ball"


@pytest.mark.parametrize("template", ["vicuna_v1", "llava_v1", "llava_llama_2", "llava_v0"])
def test_streaming_gives_the_text_of_the_batch(scripted_model, tokenizer, template):
    text = "The ball is blue 中."
    prompt, _ = encode([{"role": "user", "content": "<image>\nWhat?"}], tokenizer, template)
    ending = hashes(tokenizer) if template == "llava_v0" else [tokenizer.eos_id]
    chain = [prompt[-1], *tokenizer.encode(text, bos=False), *ending]
    model = scripted_model([chain], template=template)
    pieces = list(stream(model, prompt, random_pixels(1)))
    assert len(pieces) > 3
    assert "".join(pieces) == text == generate(model, [prompt], random_pixels(1))[0].text


def test_another_template_brings_its_own_stop_text(scripted_model, tokenizer):
    chain = [50, *tokenizer.encode("blue.", bos=False), *hashes(tokenizer), tokenizer.eos_id]
    model = scripted_model([chain])
    assert generate(model, [[1, 50]])[0].text == "blue.###"
    assert generate(model, [[1, 50]], template="llava_v0")[0].text == "blue."


# ---------------------------------------------------------------- conversations


@pytest.fixture
def picture() -> Image.Image:
    return Image.effect_noise((20, 30), 90).convert("RGB")


@pytest.fixture
def prompts(monkeypatch) -> list[tuple[list[int], Tensor | None]]:
    """What Chat shows the model, which answers "A ball." in two pieces."""
    shown = []

    def fake(model: Llava, prompt: list[int], pixels: Tensor | None, sampling: Sampling) -> Iterator[str]:
        shown.append((prompt, pixels))
        yield from ["A ", "ball."]

    monkeypatch.setattr(generation, "stream", fake)
    return shown


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize("template", ["vicuna_v1", "llava_v1", "llava_llama_2", "llava_v0"])
def test_a_chat_shows_the_whole_conversation(tokenizer, prompts, picture, template):
    chat = Chat(random_model(tokenizer, template=template))
    pixels = preprocess(picture, 16, "crop")[None]
    assert list(chat.say("What is this?", picture)) == ["A ", "ball."]
    assert "".join(chat.say(" What color? ")) == "A ball."
    spoken = turns("<image>\nWhat is this?", "A ball.", "What color?")
    assert prompts[0][0] == encode(spoken[:1], tokenizer, template)[0]
    assert prompts[1][0] == encode(spoken, tokenizer, template)[0]
    assert all(torch.equal(shown, pixels) for _, shown in prompts)
    assert chat.messages == [*spoken, *turns("", "A ball.")[1:]]


def test_a_second_picture_stands_in_its_own_turn(tokenizer, prompts, picture):
    chat = Chat(random_model(tokenizer))
    other = picture.rotate(180)
    for text, image in (("Hello.", None), ("What is this?", picture), ("And this?", other), ("Which is red?", None)):
        list(chat.say(text, image))
    a = "A ball."
    spoken = turns("Hello.", a, "<image>\nWhat is this?", a, "<image>\nAnd this?", a, "Which is red?")
    assert [len(pixels) if pixels is not None else 0 for _, pixels in prompts] == [0, 1, 2, 2]
    assert prompts[1][0] == encode(spoken[:3], tokenizer, "vicuna_v1", images=1)[0]
    assert prompts[3][0] == encode(spoken, tokenizer, "vicuna_v1", images=2)[0]
    expected = torch.stack([preprocess(image, 16, "crop") for image in (picture, other)])
    assert torch.equal(prompts[3][1], expected)


def test_reset_forgets_everything_and_may_bring_a_picture(tokenizer, prompts, picture):
    chat = Chat(random_model(tokenizer))
    list(chat.say("What is this?", picture))
    chat.reset()
    list(chat.say("Hello."))
    assert prompts[-1] == (encode(turns("Hello."), tokenizer, "vicuna_v1")[0], None)
    chat.reset(picture)
    list(chat.say("What is this?"))
    list(chat.say("Sure?"))
    assert [prompt.count(I) for prompt, _ in prompts] == [1, 0, 1, 1]


@pytest.mark.parametrize("image", [True, False])
def test_a_user_cannot_write_an_image(tokenizer, prompts, picture, image):
    chat = Chat(random_model(tokenizer))
    list(chat.say("Is <image> HTML? <ima<image>ge>", picture if image else None))
    list(chat.say("<image>"))
    assert [prompt.count(I) for prompt, _ in prompts] == [image, image]
    assert "< image> HTML?" in chat.messages[0]["content"]


def test_a_model_cannot_write_an_image_either(tokenizer, monkeypatch, picture):
    seen = []
    monkeypatch.setattr(generation, "stream", lambda model, prompt, *_: seen.append(prompt) or iter(["An <image>."]))
    chat = Chat(random_model(tokenizer))
    for text in ("What?", "Why?", "Who?"):
        assert "".join(chat.say(text, picture)) == "An <image>."
    assert [prompt.count(I) for prompt in seen] == [1, 2, 3]


def test_an_answer_that_is_left_early_stays_as_far_as_it_came(tokenizer, prompts, picture):
    chat = Chat(random_model(tokenizer))
    pieces = chat.say("What is this?", picture)
    assert next(pieces) == "A "
    pieces.close()
    assert chat.messages == turns("<image>\nWhat is this?", "A ")
    list(chat.say("What color?"))
    expected = turns("<image>\nWhat is this?", "A ", "What color?")
    assert prompts[-1][0] == encode(expected, tokenizer, "vicuna_v1")[0]


def test_ctrl_c_inside_the_network_keeps_what_was_said(tokenizer, monkeypatch):
    def interrupted(*_) -> Iterator[str]:
        yield "A "
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "stream", interrupted)
    chat = Chat(random_model(tokenizer))
    with pytest.raises(KeyboardInterrupt):
        list(chat.say("What is this?"))
    assert chat.messages == turns("What is this?", "A ")


def test_a_turn_without_an_answer_is_forgotten_but_its_picture_stays(tokenizer, monkeypatch, picture):
    monkeypatch.setattr(generation, "stream", lambda *_: iter([]))
    chat = Chat(random_model(tokenizer))
    assert list(chat.say("What is this?", picture)) == []
    assert chat.messages == []
    seen = []
    monkeypatch.setattr(generation, "stream", lambda model, prompt, *_: seen.append(prompt) or iter(["A ball."]))
    list(chat.say("And now?"))
    assert seen[0] == encode(turns("<image>\nAnd now?"), tokenizer, "vicuna_v1")[0]


def test_a_reset_in_the_middle_of_an_answer_stays_a_reset(tokenizer, prompts):
    chat = Chat(random_model(tokenizer))
    pieces = chat.say("What is this?")
    next(pieces)
    chat.reset()
    pieces.close()
    assert chat.messages == []


def test_errors_leave_the_conversation_as_it_was(tokenizer, prompts, picture, tmp_path):
    chat = Chat(random_model(tokenizer))
    list(chat.say("What is this?", picture))
    before = list(chat.messages)
    for text, image, message in (("", None, "empty"), (" \n", None, "empty"), ("What?", tmp_path / "no.png", "exist")):
        with pytest.raises(Error, match=message):
            list(chat.say(text, image))
    with pytest.raises(Error, match="exist"):
        chat.reset(tmp_path / "no.png")
    assert chat.messages == before


def test_a_conversation_that_became_too_long_is_said_to_be(scripted_model):
    chat = Chat(scripted_model.says("A ball.", positions=300))
    assert "".join(chat.say("What is this?")) == "A ball."
    before = list(chat.messages)
    with pytest.raises(Error, match="positions"):
        list(chat.say("What is this? " * 100))
    assert chat.messages == before
    assert "".join(chat.say("What is this?")) == "A ball."


def test_answer_shows_the_picture_and_asks_the_question(tokenizer, prompts, picture):
    model = random_model(tokenizer, image_aspect_ratio="pad")
    assert model.answer(picture, "What is this?", max_new_tokens=9) == "A ball."
    assert answer(model, None, "What is this?") == "A ball."
    (prompt, pixels), (text_only, none) = prompts
    assert prompt == encode(turns("<image>\nWhat is this?"), tokenizer, "vicuna_v1")[0]
    assert torch.equal(pixels, preprocess(picture, 16, "pad")[None])
    assert text_only == encode(turns("What is this?"), tokenizer, "vicuna_v1")[0]
    assert none is None


def test_pictures_are_turned_as_the_camera_was_held(tokenizer, prompts, picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn a quarter to the right
    picture.save(tmp_path / "photo.png", exif=exif)
    model = random_model(tokenizer)
    model.answer(tmp_path / "photo.png", "What?")
    model.answer(str(tmp_path / "photo.png"), "What?")
    model.answer(Image.open(tmp_path / "photo.png"), "What?")
    expected = preprocess(picture.transpose(Image.Transpose.ROTATE_270), 16, "crop")[None]
    assert len(prompts) == 3
    assert all(torch.equal(pixels, expected) for _, pixels in prompts)


def test_the_whole_way_from_a_question_to_an_answer(scripted_model, picture):
    model = scripted_model.says("The ball is blue.")
    assert model.answer(picture, "What color is it?") == "The ball is blue."
    assert model.answer(None, "What color is it?", max_new_tokens=3) == "The ball is"
    chat = Chat(model, temperature=0.1, top_k=5, seed=1)
    for _ in range(3):
        assert "".join(chat.say("What color is it?", picture)) == "The ball is blue."


# ---------------------------------------------------------------- stage 1


def test_after_stage_1_every_turn_is_a_caption_of_the_last_picture(tokenizer, prompts, picture):
    chat = Chat(random_model(tokenizer, template="plain", stage="stage1"))
    assert chat.captioner
    with pytest.raises(Error, match="give it an image"):
        list(chat.say("What is this?"))
    list(chat.say("", picture))
    list(chat.say("What is this?"))
    other = picture.rotate(180)
    list(chat.say("Well?", other))
    assert [prompt for prompt, _ in prompts] == [[tokenizer.bos_id, I]] * 3
    expected = [preprocess(image, 16, "crop")[None] for image in (picture, picture, other)]
    assert all(torch.equal(pixels, want) for (_, pixels), want in zip(prompts, expected, strict=True))


def test_a_caption_ends_with_its_line(scripted_model, tokenizer, picture):
    chain = [tokenizer.bos_id, *tokenizer.encode("A small ball", bos=False), 13, 50, 50]
    model = scripted_model([chain], template="plain", stage="stage1")
    assert tokenizer.decode([13]) == "\n"
    assert model.answer(picture, "Describe it.") == "A small ball"


# ---------------------------------------------------------------- what a caller can get wrong


@pytest.fixture(scope="module")
def talker(scripted_model):
    return scripted_model.says("Yes.")


PIXELS = torch.zeros(1, 3, 16, 16)
MISTAKES = {
    "an array for a picture": (lambda m: m.answer(np.zeros((9, 9, 3)), "What?"), "give a path or a PIL image"),
    "no question": (lambda m: m.answer(None, None), "give text"),
    "no temperature": (lambda m: m.answer(None, "What?", temperature=None), "temperature is None"),
    "half a token": (lambda m: m.answer(None, "What?", max_new_tokens=2.5), "max_new_tokens is 2.5"),
    "half a seed": (lambda m: m.answer(None, "What?", seed=1.5), "seed is 1.5"),
    "an id that is none": (lambda m: m(torch.tensor([[1, -100, 7]])), "token id -100"),
    "an id beyond the vocabulary": (lambda m: m(torch.tensor([[1, 400]])), "token id 400"),
    "a length beyond the row": (lambda m: m(torch.tensor([[1, 2, 3]]), lengths=torch.tensor([9])), "lengths"),
    "pixels of another size": (lambda m: m(torch.tensor([[1, I]]), torch.zeros(1, 3, 23, 23)), "16, 16"),
    "no batch of pixels": (lambda m: m.vision(PIXELS[0]), "16, 16"),
    "a path to preprocess": (lambda m: preprocess("a.png", 16), "PIL image is expected"),
    "no side": (lambda m: preprocess(Image.new("RGB", (9, 9)), 0), "image size 0"),
    "text without a tokenizer": (lambda m: encode([{"role": "user", "content": "Hi"}], None, "vicuna_v1"), "tokenizer"),
}


@pytest.mark.parametrize(("mistake", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_caller_s_mistake_is_one_line(mistake, words, talker):
    with pytest.raises(Error, match=re.escape(words)) as caught:
        mistake(talker)
    assert "\n" not in str(caught.value)


def test_a_picture_that_breaks_off_in_memory_is_one_line(talker, tmp_path):
    Image.effect_noise((90, 90), 99).convert("RGB").save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with pytest.raises(Error, match="damaged or incomplete"):
        talker.answer(Image.open(tmp_path / "half.png"), "What?")
