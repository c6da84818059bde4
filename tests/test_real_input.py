"""Real photographs and the real tokenizer, from records in the official format to answers in the terminal."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch

import chat
import train
from nanollava.checkpoint import save_language, save_vision
from nanollava.llama import Llama, LlamaConfig
from nanollava.tokenizer import Tokenizer
from nanollava.vit import VisionConfig, VisionTransformer

IRONING, WATERVIEW = "extreme_ironing.jpg", "waterview.jpg"
CAPTIONS = {IRONING: "a man irons a shirt on the back of a taxi", WATERVIEW: "a wooden pier leads out into a calm lake"}
TALKS = [
    (IRONING, "Where is the man?", "He is standing behind a yellow taxi, in the middle of the traffic."),
    (WATERVIEW, "Where is the man?", "There is nobody: the pier is empty."),
    (IRONING, "What is unusual?", "Nobody irons in a street.", "And the iron?", "It is on the board, in his hand."),
    (WATERVIEW, "What lies behind the lake?", "Hills with trees – and, far away, mountains (perhaps 2,000 m high)."),
    (None, "Who are you?", "I am a very small model."),
]


def record(image: str | None, *turns: str) -> dict:
    """An official record, the image behind the first question."""
    conversations = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    if image:
        conversations[0]["value"] += "\n<image>"
    return {"id": turns[0], **({"image": image} if image else {}), "conversations": conversations}


@pytest.fixture(scope="module")
def folder(llama_tokenizer_file, tmp_path_factory) -> Path:
    """Records, and a CLIP and a Vicuna of random weights with the real vocabulary."""
    folder = tmp_path_factory.mktemp("real")
    captions = [record(image, "Describe it briefly.", caption) for image, caption in CAPTIONS.items()]
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "instruct.json").write_text(json.dumps([record(*talk) for talk in TALKS]))
    torch.manual_seed(0)
    save_vision(VisionTransformer(VisionConfig(28, 7, 32, 64, 3, 2)), folder / "clip")
    language = Llama(LlamaConfig(32_000, 48, 96, 2, 4, rms_norm_eps=1e-5))
    torch.nn.init.normal_(language.embed_tokens.weight)
    save_language(language, Tokenizer(llama_tokenizer_file, legacy=False), folder / "vicuna")
    return folder


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_is_said_of_two_photographs_is_learnt_and_said_again(folder, fixtures, capsys, monkeypatch):
    """Stage 1 can only turn the projector, in front of a language model that knows nothing; stage 2 learns it all."""
    photos = fixtures / "photos"
    shared = ["--images", str(photos), "--batch-size", "5", "--device", "cpu", "--save-every", "0"]
    parts = ["--vision", str(folder / "clip"), "--language", str(folder / "vicuna"), "--projector", "mlp2x_gelu"]
    data, out = str(folder / "captions.json"), str(folder / "stage1")
    assert train.main(["stage1", "--data", data, "--out", out, "--steps", "30", "--lr", "1e-2", *parts, *shared]) == 0
    assert losses(folder / "stage1")[-1] < losses(folder / "stage1")[0] - 0.3
    data, out = str(folder / "instruct.json"), str(folder / "stage2")
    words = ["--model", str(folder / "stage1"), "--steps", "100", "--lr", "1e-2", "--optimizer", "muon"]
    assert train.main(["stage2", "--data", data, "--out", out, *words, *shared]) == 0
    assert losses(folder / "stage2")[-1] < 0.05
    capsys.readouterr()

    for image, question, answer, *_ in TALKS:
        show = ["--image", str(photos / image)] if image else []
        assert chat.main([out, *show, "--device", "cpu", "--ask", question]) == 0
        assert capsys.readouterr().out == f"{answer}\n"
    image, *turns = TALKS[2]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(turns[::2]).encode())))
    assert chat.main([out, "--image", str(photos / image), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == turns[1::2]
