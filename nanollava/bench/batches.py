"""What both libraries are trained on: records of LLaVA-Bench's lengths, their words and pixels drawn at random.

Ours packs them (train/data.py). The other gets them right-padded, as its users have them.
"""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanollava.bench.lengths import length_grouped, records
from nanollava.bench.models import image_id
from nanollava.conversation import IGNORE
from nanollava.llava import LlavaConfig, Spliced, pad, splice
from nanollava.tokenizer import IMAGE_TOKEN_ID
from nanollava.train.data import Dataset
from nanollava.train.records import Example

SYSTEM, ROLES = 34, 8  # tokens of v1.5's template: the sentence in front, and "USER: ... ASSISTANT:" of each turn


def make_examples(config: LlavaConfig, stage: str, count: int, seed: int = 0) -> list[Example]:
    """``count`` records with one image each. Stage 2: conversations of 1 to 5 turns in v1.5's template; stage 1: the
    template ``plain``, the first turn's answer as the caption."""
    draw = random.Random(seed)
    word = lambda: draw.randrange(3, image_id(config))  # noqa: E731
    examples = []
    for number, turns in enumerate(records(count, seed)):
        if stage == "stage1":
            turns, ids = [(0, turns[0][1])], [1, IMAGE_TOKEN_ID]
        else:
            ids = [1, *(word() for _ in range(SYSTEM)), IMAGE_TOKEN_ID]
        labels = [IGNORE] * len(ids)
        for question, answer in turns:
            asked = 0 if stage == "stage1" else question + ROLES
            said = [word() for _ in range(answer)] + [2]
            ids += [word() for _ in range(asked)] + said
            labels += [IGNORE] * asked + said
        examples.append(Example(np.array(ids, np.int32), np.array(labels, np.int32), (str(number),)))
    return examples


class Drawn(Dataset):
    """The dataset of train.py over pictures that are drawn, not read."""

    def __init__(self, examples: list[Example], config: LlavaConfig):
        super().__init__([[example] for example in examples], Path("."), config)

    def load(self, name: str) -> Tensor:
        S = self.config.vision.image_size
        return torch.randn(3, S, S, generator=torch.Generator().manual_seed(int(name)))


def spliced(example: Example, config: LlavaConfig) -> Spliced:
    """As ours trains on it: the image widened, cut to ``max_length`` positions."""
    ids, labels = example.token_ids.tolist(), example.labels.tolist()
    return splice(ids, labels, config.vision.num_patches, config.max_length)


def grouped(data: Drawn, numbers: Sequence[int], size: int) -> list[list[int]]:
    """These records in batches of similar length, as the official code groups them."""
    lengths = [len(spliced(data.groups[n][0], data.config).labels) for n in numbers]
    batches = length_grouped(lengths, [True] * len(lengths), size, seed=0)
    return [[numbers[place] for place in batch] for batch in batches]


def padded(data: Drawn, numbers: Iterable[int], image: int) -> dict[str, Tensor]:
    """The arguments of LlavaForConditionalGeneration for these records, to which <image> is the id ``image``."""
    chosen = [data.groups[n][0] for n in numbers]
    rows = [spliced(example, data.config) for example in chosen]
    return {
        "input_ids": pad([[image if t == IMAGE_TOKEN_ID else t for t in row.token_ids] for row in rows], 0),
        "labels": pad([row.labels for row in rows], IGNORE),
        "attention_mask": pad([[1] * len(row.labels) for row in rows], 0),
        "pixel_values": torch.stack([data.load(name) for example in chosen for name in example.images]),
    }
