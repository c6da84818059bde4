"""What several test files share: one thread, the files of real input, small models made on the spot, and Ctrl-C."""

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
import torch
from PIL import Image

import train
from nanollava import checkpoint
from nanollava.evaluate import __main__ as evaluate
from nanollava.llama import Llama, LlamaConfig
from nanollava.llava import Llava, LlavaConfig
from nanollava.miniature.scenes import draw, random_scene
from nanollava.tokenizer import Tokenizer
from nanollava.vit import VisionConfig, VisionTransformer

torch.set_num_threads(1)

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


class Scripted:
    """Tiny models without a will of their own, for tests of what stands around a model."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, chains: list[list[int]], positions: int = 400, **settings: str) -> Llava:
        """A model in which each token of a chain is followed by the next one, whatever stood before it."""
        torch.manual_seed(0)
        vision = VisionConfig(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
        language = LlamaConfig(400, 128, 8, 1, 2, max_position_embeddings=positions)
        model = Llava(LlavaConfig(vision, language, **settings), self.tokenizer).eval()
        for block in model.language.layers:  # nothing but the embedding of the last token reaches the head
            block.self_attn.o_proj.weight.data.zero_()
            block.mlp.down_proj.weight.data.zero_()
        embedding = model.language.embed_tokens.weight.data.normal_()
        head = model.language.lm_head.weight.data.zero_()
        follows: dict[int, int] = {}
        for token, following in {pair for chain in chains for pair in pairwise(chain)}:
            assert follows.setdefault(token, following) == following, "a token can have only one that follows"
            head[following] += embedding[token]
        model.projector.weight.data.zero_()
        model.projector.bias.data.copy_(embedding[self.tokenizer.bos_id])  # an image is followed by what follows <s>
        return model

    def says(self, text: str, **settings: str) -> Llava:
        """A model that answers every question with that text and the end token."""
        colon = self.tokenizer.encode(" ASSISTANT:", bos=False, prefix=False)[-1]
        return self([[colon, *self.tokenizer.encode(text, bos=False), self.tokenizer.eos_id]], **settings)


@pytest.fixture(scope="session")
def scripted_model(tiny_tokenizer_file: Path) -> Scripted:
    """A function (chains of token ids) -> model that writes them; and ``.says(text)``."""
    return Scripted(Tokenizer(tiny_tokenizer_file))


class Trainer:
    """train.py in this process, and tiny official folders to start from: clip/ and vicuna/, random weights."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.clip, self.vicuna, self.images = folder / "clip", folder / "vicuna", folder / "images"
        torch.manual_seed(0)
        checkpoint.save_vision(VisionTransformer(VisionConfig(16, 8, 16, 16, 2, 2)), self.clip)
        # heads 16 wide: the fused attention takes none below
        checkpoint.save_language(Llama(LlamaConfig(400, 32, 16, 2, 2, 1)), tokenizer, self.vicuna)
        self.images.mkdir()
        for seed, name in enumerate("abcd"):
            noise = torch.randint(256, (20, 30, 3), generator=torch.Generator().manual_seed(seed))
            Image.fromarray(noise.byte().numpy()).save(self.images / f"{name}.png")

    def __call__(self, *words: object) -> int:
        """The exit status of ``python train.py WORDS``."""
        return train.main([str(word) for word in words])

    def stage(self, number: int, data: Path, out: Path, *words: object) -> int:
        """A stage on that data, from clip/ and vicuna/ unless the words name a --model."""
        start = () if "--model" in words else ("--vision", self.clip, "--language", self.vicuna)
        images = () if "--images" in words else ("--images", self.images)
        device = () if "--device" in words else ("--device", "cpu")
        return self(f"stage{number}", "--data", data, "--out", out, *start, *images, *device, *words)


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Trainer:
    """``trainer.stage(1, data, out, "--steps", 3)`` -> exit status; images a.png to d.png are there."""
    return Trainer(tmp_path_factory.mktemp("trainer"), Tokenizer(tiny_tokenizer_file))


@pytest.fixture
def heeding_ctrl_c() -> Iterator[None]:
    """Python's own answer to Ctrl-C, also where the tests were started deaf to it, as background jobs are."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def published(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with questions.jsonl, the 90 of LLaVA-Bench (COCO), and answers.jsonl, those of the bundled miniature.

    COCO's photographs cannot be had here: drawn pictures stand under their names.
    """
    folder, source = tmp_path_factory.mktemp("published"), fixtures / "llava_bench_coco" / "qa90_questions.jsonl"
    (folder / "questions.jsonl").write_bytes(source.read_bytes())
    names = sorted({json.loads(line)["image"] for line in source.read_text().splitlines()})
    (folder / "images").mkdir()
    for seed, name in enumerate(names):
        draw(random_scene(random.Random(seed), "test"), seed)[0].save(folder / "images" / name)
    model = Path(__file__).parents[1] / "weights" / "miniature"
    inputs = [f"--questions={folder / 'questions.jsonl'}", f"--images={folder / 'images'}", "--device=cpu"]
    words = [*inputs, "--max-new-tokens=24", "--batch-size=30", f"--out={folder / 'answers.jsonl'}"]
    assert evaluate.main(["llava-bench", "answer", str(model), *words]) == 0
    return folder
