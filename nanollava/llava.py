"""LLaVA: a vision tower, a projector and a language model joined (LLaVA section 4.1, figure 1).

    H_v = W g(X_v);  the image tokens H_v take the place of <image> among the word embeddings H_q

Shapes: B batch, M images, S image side, N patches, C vision width, D language width, T positions, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from nanollava.attention import Mask
from nanollava.conversation import IGNORE
from nanollava.error import Error
from nanollava.llama import Llama, LlamaConfig
from nanollava.loss import summed_cross_entropy
from nanollava.projector import make_projector
from nanollava.tokenizer import IMAGE_TOKEN_ID, Tokenizer
from nanollava.vit import VisionConfig, VisionTransformer

NO_PATCH = -1


@dataclass
class LlavaConfig:
    """The sizes of the three parts, and how pictures and conversations reach them; one comment for each field."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LlamaConfig = field(default_factory=LlamaConfig)
    projector_type: str = "linear"  # "linear" (the paper) or "mlp2x_gelu" (v1.5)
    select_layer: int = -2  # which hidden state of the tower is the feature
    image_aspect_ratio: str = "crop"  # "crop" (the paper) or "pad" (v1.5): how a picture becomes a square
    template: str = "vicuna_v1"  # the conversation template that the weights were trained with
    max_length: int = 2048  # positions after splicing; what is longer is cut
    stage: str = ""  # which stage made the weights: "stage1", "stage2", or unknown
    use_im_start_end: bool = False  # whether an image stands between tokens <im_start> and <im_end> (v0 and v1)


class Spliced(NamedTuple):
    """A sequence with every <image> widened to N positions. All three lists have one entry for each position."""

    token_ids: list[int]  # IMAGE_TOKEN_ID at image positions
    labels: list[int]  # IGNORE at image positions
    patches: list[int]  # image * N + patch at image positions, NO_PATCH elsewhere


def splice(token_ids: list[int], labels: list[int], num_patches: int, max_length: int | None = None) -> Spliced:
    """Widen every <image> placeholder to its N patches and only then cut to ``max_length`` positions.

    The images of a sequence are numbered from 0 in reading order. With N = 3:

        token_ids  1  -200              77   ->   1  -200 -200 -200  77
        patches                                  -1     0    1    2  -1
    """
    out, image = Spliced([], [], []), 0
    for token, label in zip(token_ids, labels, strict=True):
        if token == IMAGE_TOKEN_ID:
            out.token_ids.extend([IMAGE_TOKEN_ID] * num_patches)
            out.labels.extend([IGNORE] * num_patches)
            out.patches.extend(range(image * num_patches, (image + 1) * num_patches))
            image += 1
        else:
            out.token_ids.append(token)
            out.labels.append(label)
            out.patches.append(NO_PATCH)
    return Spliced(*(column[:max_length] for column in out))


def pad(rows: list[list[int]], value: int, left: bool = False) -> Tensor:
    """Lists of different lengths -> (B, T) with ``value`` behind the shorter ones, or in front of them."""
    length = max(map(len, rows))
    filling = [[value] * (length - len(row)) for row in rows]
    return torch.tensor([f + row if left else row + f for row, f in zip(rows, filling, strict=True)])


@dataclass
class Batch:
    """Packed rows, ready for one forward pass. A row holds documents; a document may hold a shared beginning (branch
    0) and branches behind it that do not see each other. All but ``pixels`` are (B, T)."""

    token_ids: Tensor
    labels: Tensor  # IGNORE where a position is not to be predicted
    patches: Tensor  # as in Spliced, images numbered through the whole batch
    positions: Tensor  # as if every branch stood alone behind its shared beginning
    documents: Tensor  # -1 is padding
    branches: Tensor
    pixels: Tensor | None  # (M, 3, S, S), or cached patch features, which ``vision`` then hands on (train/features.py)

    def to(self, device: torch.device) -> "Batch":
        move = lambda x: x if x is None else x.to(device, non_blocking=True)  # noqa: E731
        return Batch(**{name: move(value) for name, value in vars(self).items()})


class Llava(nn.Module):
    """Vision tower, projector and language model as one network (figure 1): (B, T) ids with -200 for each image and
    (M, 3, S, S) pixels -> (B, T', V) logits. ``tokenizer`` comes along for those who pass text; it may be None."""

    def __init__(self, config: LlavaConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vision = VisionTransformer(config.vision)
        self.projector = make_projector(config.projector_type, config.vision.hidden_size, config.language.hidden_size)
        self.language = Llama(config.language)
        self.step: Callable[..., Tensor] | None = None  # a compiled step of decoding: decoding.compile_decoding

    @property
    def device(self) -> torch.device:
        return self.language.embed_tokens.weight.device

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """(M, 3, S, S) -> (M, N, D)."""
        features = self.vision(pixels.to(self.vision.pre_layrnorm.weight.dtype), self.config.select_layer)
        return self.projector(features.to(next(self.projector.parameters()).dtype))

    def embed(self, token_ids: Tensor, patches: Tensor, pixels: Tensor | None) -> Tensor:
        """(B, T) spliced ids and patch numbers, (M, 3, S, S) -> (B, T, D): words and image tokens in one sequence."""
        words = self.language.embed_tokens(token_ids.clamp(min=0))  # -200 has no row: id 0 keeps its place till below
        where = patches != NO_PATCH
        if pixels is None or not where.any():
            return words
        image_tokens = self.image_tokens(pixels).flatten(0, 1)  # (M, N, D) -> (M N, D): M times N rows
        return words.index_put((where,), image_tokens[patches[where]].to(words.dtype))

    def forward(self, token_ids: Tensor, pixels: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """(B, T) ids with -200 for each image, (M, 3, S, S) images in reading order -> (B, T', V) logits.

        Rows of different lengths are padded on the right and come with ``lengths`` (B,). T' counts N positions for each
        image; what is longer than ``max_length`` is cut, as in training. Attention is causal, so no word sees the
        padding behind it. Raises Error where the number of placeholders is not M, or an id or a length cannot be.
        """
        rows = token_ids.tolist()
        if lengths is not None:
            if not all(0 < length <= token_ids.shape[1] for length in lengths.tolist()):
                raise Error(f"lengths {lengths.tolist()}: each must be from 1 to the {token_ids.shape[1]} of a row")
            rows = [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]
        ids, patches = self.splice_rows(rows, 0 if pixels is None else len(pixels), self.config.max_length)
        spliced = (pad(ids, 0).to(token_ids.device), pad(patches, NO_PATCH).to(token_ids.device))
        return self.language.lm_head(self.language.hidden(self.embed(*spliced, pixels)))

    def splice_rows(
        self, rows: list[list[int]], images: int, max_length: int | None = None
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Rows of ids -> their spliced ids and patch numbers, images counted through the rows.

        Raises Error where the number of placeholders is not ``images``, or an id is in no vocabulary.
        """
        rows_known = range(self.config.language.vocab_size)
        if unknown := {t for row in rows for t in row if t not in rows_known and t != IMAGE_TOKEN_ID}:
            raise Error(f"token id {min(unknown)}: the vocabulary has 0 to {rows_known[-1]}, an image {IMAGE_TOKEN_ID}")
        num_patches, placeholders = self.config.vision.num_patches, 0
        ids, patches = [], []
        for row in rows:
            spliced = splice(row, row, num_patches, max_length)
            ids.append(spliced.token_ids)
            first = placeholders * num_patches
            patches.append([p if p == NO_PATCH else p + first for p in spliced.patches])
            placeholders += row.count(IMAGE_TOKEN_ID)
        if placeholders != images:
            raise Error(f"the text has {placeholders} <image> placeholders but {images} images were given")
        return ids, patches

    def answer(self, image: str | Path | Image.Image | None, question: str, **sampling: Any) -> str:
        """One question about one picture (a path or a PIL image; None: no picture). See ``generate.answer``."""
        from nanollava.generate import answer  # here, because generate.py builds on this module

        return answer(self, image, question, **sampling)

    def loss(self, batch: Batch) -> Tensor:
        """Summed cross-entropy of all target tokens (equation 3); divide by their number over the whole step."""
        mask = Mask(documents=batch.documents, branches=batch.branches)
        x = self.embed(batch.token_ids, batch.patches, batch.pixels)
        hidden = self.language.hidden(x, batch.positions, mask)
        # what stands at t + 1 is predicted at t; what begins a record or a branch never is
        targets = batch.labels[:, 1:]
        counted = targets != IGNORE  # logits take V numbers a position: only where they are needed
        return summed_cross_entropy(hidden[:, :-1][counted], self.language.lm_head.weight, targets[counted])
