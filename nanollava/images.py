"""A picture becomes pixels exactly as CLIP expects them (LLaVA, section 4.1: the tower is CLIP's, and so is its input).

Sizes are rounded, samples interpolated and numbers cast in the order of the reference implementation, bit for bit: a
tower that was trained on one set of pixels gives slightly other features for another.
"""

import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from nanollava.error import Error, first_line

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images: red, green, blue, in units of full brightness
STD = (0.26862954, 0.26130258, 0.27577711)
FILL = tuple(int(value * 255) for value in MEAN)  # (122, 116, 104): what "pad" puts around a picture

MAX_PIXELS = 150_000_000  # 600 MB once decoded, and below what Pillow itself refuses
MAX_SIDE = 65_535  # the longest side of a JPEG
UNREADABLE = "image unreadable"  # the kind of an Error for a file that is there, and no picture by its header
MAX_RATIO = 256  # of long to short edge, up to which a picture is resized whole before the crop

# What Pillow remarks on (a large picture, odd metadata) is either harmless here or becomes an Error below.
warnings.filterwarnings("ignore", module=r"PIL\.")


# ---------------------------------------------------------------- from pixels in a file to a tensor


def preprocess(image: Image.Image, size: int, mode: str = "crop") -> torch.Tensor:
    """A PIL image of any mode and shape -> float32 pixels (3, S, S), S = `size`, normalised by CLIP's mean and std.

    "crop" (CLIP, LLaVA v1): the short edge becomes S, the middle square is kept.
    "pad" (LLaVA v1.5's stage 2): the picture is centred on a square of the mean colour, then becomes S by S.
    Raises Error for an unknown mode, a picture without pixels, or anything else than a PIL image.
    """
    if not isinstance(image, Image.Image):
        raise Error(f"a {type(image).__name__} where a PIL image is expected; PIL.Image.open or fromarray makes one")
    if not isinstance(size, int) or size < 1:
        raise Error(f"image size {size!r}: the side of the square in pixels must be 1 or more")
    if mode not in ("crop", "pad"):
        raise Error(f'image mode "{mode}" is unknown: image_aspect_ratio must be "crop" or "pad"')
    if 0 in image.size:
        raise Error(f"an image of {image.width}x{image.height} pixels has nothing to look at; at least one is needed")
    image = to_rgb(image)
    square = resize_and_crop(image, size) if mode == "crop" else pad_and_resize(image, size)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()  # (3, S, S) uint8
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Short edge -> S by bicubic interpolation, long edge in proportion (truncated), then the middle S by S.

    One call to `resize`, because Pillow 13 and older ones differ in the order of its two passes on tall pictures: so
    ours are always the pixels that the reference gives with the same Pillow.
    """
    image = _middle(image)
    width, height = image.size
    short, long = min(image.size), max(image.size)
    edge = int(size * long / short)
    width, height = (size, edge) if width <= height else (edge, size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def _middle(image: Image.Image) -> Image.Image:
    """Very long pictures without their ends, which the crop discards anyway (1 x 5000 would become 224 x 1,120,000)."""
    short, long = min(image.size), max(image.size)
    end = max(0, (long - MAX_RATIO * short) // 2)  # the same on both sides, so that the middle stays the middle
    x, y = (end, 0) if image.width > image.height else (0, end)
    return image.crop((x, y, image.width - x, image.height - y)) if end else image


def pad_and_resize(image: Image.Image, size: int) -> Image.Image:
    """Centred on a square of FILL whose side is the long edge, then S by S by bicubic interpolation."""
    side = max(image.size)
    if side * side > MAX_PIXELS:  # 20,000 x 20 pixels would be padded to 1.6 GB: average small blocks first
        image = image.reduce(math.ceil(side / math.isqrt(MAX_PIXELS)))
        side = max(image.size)
    square = Image.new("RGB", (side, side), FILL)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> RGB as Pillow converts it: alpha is dropped, not blended; 16-bit grey keeps its upper 8 bits."""
    if image.mode.startswith("I"):  # 16-bit grey is "I;16" or, from some formats, "I"; Pillow would clip it at 255
        grey = np.asarray(image).clip(0, 65535) // 256
        image = Image.fromarray(grey.astype(np.uint8))
    if "transparency" in image.info:
        image = image.copy()
        del image.info["transparency"]  # or Pillow warns that a palette's alpha is lost
    return image.convert("RGB")


# ---------------------------------------------------------------- files


def open_image(path: str | Path, exif: bool = False) -> Image.Image:
    """The picture in a file, decoded, in RGB; of an animation the first frame. `exif` turns it as the camera was held.

    Raises Error for whatever `check_image` refuses and for a picture that breaks off or cannot be decoded.
    """
    with _open(path) as image:
        try:
            image.load()
            picture = to_rgb(upright(image) if exif else image)
        except Exception as error:  # Pillow's decoders raise a dozen kinds; all mean that the file is damaged
            problem = f"the image is damaged or incomplete ({first_line(error)})"
            raise Error(f"{path}: {problem}; fetch it again", "image damaged") from error
    return picture


def check_image(path: str | Path) -> tuple[int, int]:
    """(width, height) of a picture. Raises Error where its file is missing, empty, no image or too large; only the
    header is read, so damage behind it is not seen."""
    with _open(path) as image:
        return image.size


def _open(path: str | Path) -> Image.Image:
    """Pillow's lazily opened image, its size already found acceptable."""
    if not os.path.isfile(path):  # pathlib's is_file raises on names that are too long
        there = os.path.exists(path)
        problem, kind = ("is not a file", UNREADABLE) if there else ("does not exist", "image missing")
        raise Error(f"{path}: the image {problem}; check its name and folder", kind)
    try:
        if Path(path).stat().st_size == 0:
            raise Error(f"{path}: the image is an empty file (0 bytes); fetch it again", UNREADABLE)
        image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise Error(_too_large(path, "more than Pillow's limit of"), UNREADABLE) from error
    except Image.UnidentifiedImageError as error:
        raise Error(f"{path}: not an image that Pillow can read; convert it to JPEG or PNG", UNREADABLE) from error
    except (OSError, ValueError, SyntaxError, RuntimeError) as error:  # RuntimeError: damaged AVIF and DDS files
        raise Error(f"{path}: the image cannot be read ({first_line(error)})", UNREADABLE) from error
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        image.close()
        raise Error(_too_large(path, f"{image.width} x {image.height}, beyond"), UNREADABLE)
    return image


def _too_large(path: str | Path, what: str) -> str:
    limit = f"{MAX_PIXELS // 10**6} million pixels or {MAX_SIDE} a side"
    return f"{path}: the image is too large ({what} {limit}); make it smaller"


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; as it is stored where that cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken metadata is no reason to refuse the picture
        return image
