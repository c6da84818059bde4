"""Pixels against transformers' image processors (their PIL versions), bit for bit."""

import numpy as np
import pytest
import torch
from PIL import Image

from nanollava.images import FILL, open_image, preprocess

SIZES = [
    (333, 500),
    (501, 337),
    (1001, 777),
    (1, 1),
    (1, 90),
    (90, 1),
    (7, 7),
    (2000, 61),
    (61, 1999),
    (224, 224),
    (336, 336),
    (224, 300),
    (335, 337),
    (640, 480),
    (48, 47),
]


@pytest.fixture(scope="module")
def processor():
    """transformers' CLIP processor of the PIL kind, for a given S."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'nanollava[oracle]'")
    return lambda size: transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * 10_000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def padded(image: Image.Image) -> Image.Image:
    """The square that the official v1.5 code makes before its processor sees the image."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), FILL)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def assert_same(image: Image.Image, size: int, processor) -> None:
    for mode, given in (("crop", image), ("pad", padded(image))):
        theirs = processor(size)(given, return_tensors="pt")["pixel_values"][0]
        ours = preprocess(image, size, mode)
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs), (mode, size, image.size)


@pytest.mark.parametrize("size", [224, 336, 48])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_equals_clip_bit_for_bit(shape, size, processor):
    assert_same(noise(*shape), size, processor)


@pytest.mark.parametrize("size", [224, 336])
def test_photographs_equal_clip_bit_for_bit(size, processor, fixtures):
    photos = sorted((fixtures / "photos").glob("*.jpg"))
    assert photos
    for photo in photos:
        assert_same(open_image(photo), size, processor)
