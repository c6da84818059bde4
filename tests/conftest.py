"""What several test files share: two threads, the files of real input, and a small tokenizer made on the spot."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch

torch.set_num_threads(2)

SENTENCES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "A chat between a curious human and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is this? ASSISTANT: A small red star.",
    "Human: What color is the ball? Assistant: The ball is blue.",
    "### ## # [INST] [/INST] <<SYS>> <</SYS>>",
    "There are three shapes: a circle, a square and a big green triangle.",
]


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of real input: tokenizer/tokenizer.model, photos/*.jpg and llava_bench_coco/*.jsonl."""
    folder = os.environ.get("NANOLLAVA_FIXTURES")
    if not folder:
        pytest.skip(
            "NANOLLAVA_FIXTURES is not set: it names a folder with tokenizer/tokenizer.model (the 32,000-piece LLaMA "
            "model, public in karpathy/llama2.c), photos/ and llava_bench_coco/ (public in haotian-liu/LLaVA)"
        )
    if not Path(folder).is_dir():
        pytest.skip(f"NANOLLAVA_FIXTURES={folder}: no such folder")
    return Path(folder)


@pytest.fixture(scope="session")
def llama_tokenizer_file(fixtures: Path) -> Path:
    """The genuine SentencePiece model of LLaMA and Vicuna."""
    file = fixtures / "tokenizer" / "tokenizer.model"
    if not file.is_file():
        pytest.skip(f"{file} is missing: the 32,000-piece LLaMA tokenizer.model is public in karpathy/llama2.c")
    return file


@pytest.fixture(scope="session")
def train_tokenizer() -> Callable[..., None]:
    """A function (file, **settings) that trains a SentencePiece model of 400 pieces the way LLaMA's is set up."""

    def train(file: Path, **settings: object) -> None:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES),
            model_prefix=str(file.with_suffix("")),
            model_type="bpe",
            vocab_size=400,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
            **settings,
        )

    return train


@pytest.fixture(scope="session")
def tiny_tokenizer_file(tmp_path_factory: pytest.TempPathFactory, train_tokenizer: Callable[..., None]) -> Path:
    """A small model with LLaMA's special tokens: `<unk>` 0, `<s>` 1, `</s>` 2, no padding."""
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(file, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    return file
