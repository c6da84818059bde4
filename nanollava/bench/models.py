"""The architectures that are timed, and folders of random weights that both libraries read."""

import contextlib
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from nanollava import config as fields
from nanollava import folder as files
from nanollava import layouts
from nanollava.convert import OFFICIAL, SHARD, draw, write_shards
from nanollava.error import Error
from nanollava.generate import EOS_ID
from nanollava.llama import LlamaConfig
from nanollava.llava import Llava, LlavaConfig
from nanollava.tokenizer import IMAGE_TOKEN_ID
from nanollava.vit import VisionConfig

TEXT = 64  # positions of the prompt that are words
VIT_B = VisionConfig(384, 16, 768, 3072, 12, 12)
VIT_L = VisionConfig(336, 14, 1024, 4096, 24, 16)
MODELS = {
    # weights/miniature; as many positions as the others, so that the same records fit
    "miniature": LlavaConfig(VisionConfig(48, 16, 128, 512, 4, 4), LlamaConfig(1000, 128, 352, 4, 4), "mlp2x_gelu"),
    # the decoder of SmolLM-135M behind a ViT-B/16 at 384 pixels: 576 patches
    "135m": LlavaConfig(VIT_B, LlamaConfig(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True), "mlp2x_gelu"),
    # the decoder of TinyLlama behind CLIP ViT-L/14 at 336 pixels
    "1.1b": LlavaConfig(VIT_L, LlamaConfig(32000, 2048, 5632, 22, 32, 4), "mlp2x_gelu"),
    "7b": OFFICIAL["llava-1.5-7b"],
}


def without_numbers(config: LlavaConfig) -> Llava:
    """The model without numbers."""
    with torch.device("meta"):
        return Llava(config)


def parameters(config: LlavaConfig) -> int:
    return sum(p.numel() for p in without_numbers(config).parameters())


def stored_bytes(config: LlavaConfig, dtype: torch.dtype) -> int:
    return parameters(config) * dtype.itemsize


def write_random(config: LlavaConfig, folder: Path, dtype: torch.dtype) -> None:
    """Write ``folder``, llava-hf with random weights in shards of 5 GB, of which one at a time is in memory.

    <image> is the vocabulary's last id, so that both libraries have the same rows. Its row and the end token's are 0:
    no answer ever ends early or holds an image. Raises Error where the disk is too small.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if problem := lack_of_disk(folder.parent, stored_bytes(config, dtype)):
        raise Error(f"{folder.parent}: {problem}; make room there, or set TMPDIR to another folder")
    torch.manual_seed(0)
    with files.atomic_folder(folder) as new:
        shards = split(config, dtype)
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table
            write_shards(({n: fresh(n, shape, dtype) for n, shape in shard} for shard in shards), len(shards), new)
        files.write_json(new / "config.json", settings(config, dtype))


def lack_of_disk(folder: Path, needed: int) -> str:
    """What there is and what is needed; "" where it is enough."""
    free = shutil.disk_usage(folder).free
    return f"takes {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} are free" if free < 1.05 * needed else ""


def settings(config: LlavaConfig, dtype: torch.dtype) -> dict:
    """config.json: nothing stands behind <image>, so no rows are cut, and padding is any other id."""
    written = fields.llava_hf_fields(config, dtype, image_id(config), config.language.vocab_size)
    return written | {"rows_before_image": None, "pad_token_id": 0}


def image_id(config: LlavaConfig) -> int:
    """What transformers is given at an image's positions."""
    return config.language.vocab_size - 1


def split(config: LlavaConfig, dtype: torch.dtype) -> list[list[tuple[str, torch.Size]]]:
    """Names and shapes of the tensors, in shards. A tied head is not stored."""
    shards, room = [[]], SHARD
    for name, tensor in without_numbers(config).state_dict().items():
        if name == "language.lm_head.weight" and config.language.tie_word_embeddings:
            continue
        if dtype.itemsize * tensor.numel() > room:
            shards.append([])
            room = SHARD
        room -= dtype.itemsize * tensor.numel()
        shards[-1].append((layouts.theirs(name, layouts.LLAVA_HF), tensor.shape))
    return shards


def fresh(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A random tensor; of embedding and head, the rows that no answer may use are zero."""
    tensor = draw(name, shape).to(dtype)
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        tensor[[EOS_ID, -1]] = 0
    return tensor


def prompt(config: LlavaConfig) -> list[int]:
    """Ids of a question of TEXT positions about one image."""
    draw_from = torch.Generator().manual_seed(1)
    words = torch.randint(3, image_id(config), (TEXT - 1,), generator=draw_from)
    return [1, IMAGE_TOKEN_ID, *words.tolist()]


def picture(config: LlavaConfig, count: int = 1) -> Tensor:
    """(count, 3, S, S): pixels as ``preprocess`` leaves them, mean 0 and variance 1."""
    S = config.vision.image_size
    return torch.randn(count, 3, S, S, generator=torch.Generator().manual_seed(2))
