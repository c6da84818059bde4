"""Folders made with transformers and PEFT (tests/golden/make.py), read without them: the numbers are theirs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanollava import convert, lora
from nanollava.checkpoint import load, load_language, load_vision
from nanollava.generate import Sampling, generate
from nanollava.llava import Llava
from nanollava.tokenizer import IMAGE_TOKEN_ID as IMAGE

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 2e-5  # relative, float32
PIXELS = torch.linspace(-2, 2, 2 * 3 * 12 * 12).sin().view(2, 3, 12, 12)
WORDS = torch.tensor([[1, 5, 44, 7, 33]])


def check(name: str, what: str, found: torch.Tensor) -> None:
    expected = load_file(GOLDEN / name / "expected.safetensors")[what]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() / expected.abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["clip", "clip-tower"])
def test_features(name):
    with torch.no_grad():
        check(name, "features", load_vision(GOLDEN / name)(PIXELS, -2))


def test_logits_of_a_decoder_and_of_a_lora_over_it():
    language = load_language(GOLDEN / "llama")
    with torch.no_grad():
        check("llama", "logits", language(WORDS))
        lora.merge_folder(language, GOLDEN / "lora")
        check("lora", "logits", language(WORDS))


@pytest.mark.parametrize("name", ["llava-hf", "llava-new", "llava", "llava-v0", "stage1", "lora-run"])
def test_logits_and_words_of_a_llava(name):
    check_llava(name, load(GOLDEN / name))


def test_logits_and_words_of_a_base_with_its_delta(tmp_path):
    assert convert.main(["apply-delta", str(GOLDEN / "llama"), str(GOLDEN / "delta"), str(tmp_path / "sum")]) == 0
    check_llava("delta", load(tmp_path / "sum", vision=GOLDEN / "clip"))


def check_llava(name: str, model: Llava) -> None:
    image = model.tokenizer.image_ids if model.tokenizer else [IMAGE]
    ids = [1, *image, 5, 6, *image, 7, 8]
    with torch.no_grad():
        check(name, "logits", model(torch.tensor([ids]), PIXELS))
    (answer,) = generate(model, [ids], PIXELS, Sampling(max_new_tokens=6), "vicuna_v1")
    words = [*load_file(GOLDEN / name / "expected.safetensors")["words"].tolist(), 2]
    assert answer.ids == words[: words.index(2)]
