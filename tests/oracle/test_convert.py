"""What is exported runs in transformers: the same logits, and by its processor the same ids, pixels and answer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nanollava
from nanollava import convert
from nanollava.conversation import render
from nanollava.tokenizer import IMAGE_TOKEN_ID as IMAGE

transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install .[oracle]")

MINIATURE = Path(__file__).parents[2] / "weights" / "miniature"
QUESTION = "What colour is the heart?"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "llava-hf"
    convert.export(MINIATURE, folder, "llava-hf", torch.float32)
    return folder


def their_model(folder: Path):
    return transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def test_transformers_gives_the_logits_of_what_was_exported(exported):
    ours, theirs = nanollava.load(MINIATURE), their_model(exported)
    ids, pixels = [1, 300, IMAGE, 301, 302], torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    V = ours.config.language.vocab_size
    widened = [t for token in ids for t in ([V] * 9 if token == IMAGE else [token])]
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([widened]), pixel_values=pixels).logits[..., :V]
        found = ours(torch.tensor([ids]), pixels)
    assert (found - expected).abs().max() / expected.abs().max() < 2e-5


def test_its_processor_gives_our_ids_and_pixels_and_it_answers_as_we_do(exported):
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with it: pip install .[oracle]")
    processor, theirs = transformers.AutoProcessor.from_pretrained(exported), their_model(exported)
    model, image = nanollava.load(MINIATURE), Image.open(MINIATURE / "sample.png")
    message = [{"role": "user", "content": f"<image>\n{QUESTION}"}]
    inputs = processor(text=render(message, "vicuna_v1"), images=image, return_tensors="pt")
    ids, _ = nanollava.encode(message, model.tokenizer, "vicuna_v1")
    V = model.config.language.vocab_size
    assert inputs["input_ids"][0].tolist() == [t for i in ids for t in ([V] * 9 if i == IMAGE else [i])]
    assert np.array_equal(inputs["pixel_values"][0].numpy(), nanollava.preprocess(image, 48, "crop").numpy())
    answer = theirs.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(answer, skip_special_tokens=True).strip() == model.answer(image, QUESTION)


def test_its_chat_template_writes_our_prompts(exported):
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with it: pip install .[oracle]")
    processor = transformers.AutoProcessor.from_pretrained(exported)
    question = {"role": "user", "content": f"<image>\n{QUESTION}"}
    turns = [question, {"role": "assistant", "content": "Red."}, {"role": "user", "content": "Why?"}]
    in_parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION}, {"type": "image"}]}]
    for messages, ours in ((turns[:1], turns[:1]), (turns, turns), (in_parts, turns[:1])):
        theirs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert theirs == render(ours, "vicuna_v1")
    told = processor.apply_chat_template(turns[:2], tokenize=False)
    assert told == render(turns[:2], "vicuna_v1")


def test_a_padded_model_is_exported_with_its_padding(tmp_path):
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with it: pip install .[oracle]")
    model, picture = nanollava.load(MINIATURE), Image.effect_noise((90, 60), 99).convert("RGB")
    model.config.image_aspect_ratio = "pad"
    nanollava.save(model, tmp_path / "padded")
    convert.export(tmp_path / "padded", tmp_path / "llava-hf", "llava-hf")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "llava-hf")
    pixels = processor(text="<image>", images=picture, return_tensors="pt")["pixel_values"][0]
    assert np.array_equal(pixels.numpy(), nanollava.preprocess(picture, 48, "pad").numpy())
    assert nanollava.load(tmp_path / "llava-hf").config.image_aspect_ratio == "pad"
