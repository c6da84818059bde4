"""Pixels: their geometry and numbers, what kinds of picture are understood, and what is said of bad ones."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from nanollava.error import Error
from nanollava.images import FILL, MAX_PIXELS, MEAN, STD, check_image, open_image, preprocess, to_rgb

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * 10_000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def in_one_piece(image: Image.Image, size: int, mode: str) -> torch.Tensor:
    """The pixels as the reference makes them, written the shortest way (numpy, the whole picture at each step)."""
    if mode == "pad":
        square = Image.new("RGB", (max(image.size),) * 2, FILL)
        square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
        image = square
    short, long = sorted(image.size)
    edge = int(size * long / short)
    image = image.resize((size, edge) if image.width <= image.height else (edge, size), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    values = np.array(image.crop((left, top, left + size, top + size))).astype(np.float64) * (1 / 255)
    values = (values.astype(np.float32) - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(values).permute(2, 0, 1)


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize(
    "shape",
    [
        (333, 500),
        (501, 337),
        (1001, 777),
        (1, 1),
        (1, 80),
        (80, 1),
        (48, 48),
        (48, 90),
        (90, 48),
        (3000, 20),
        (20, 3000),
        (1500, 2100),
    ],
    ids=str,
)
def test_equals_the_reference_written_plainly(shape, mode):
    image = noise(*shape)
    for size in (48, 224):
        pixels = preprocess(image, size, mode)
        assert pixels.shape == (3, size, size) and pixels.dtype == torch.float32 and pixels.is_contiguous()
        assert torch.equal(pixels, in_one_piece(image, size, mode))


def test_random_shapes_equal_the_reference():
    draw = random.Random(0)
    for _ in range(40):
        image, size = noise(draw.randint(1, 400), draw.randint(1, 400)), draw.choice([14, 48, 63, 224])
        for mode in ("crop", "pad"):
            assert torch.equal(preprocess(image, size, mode), in_one_piece(image, size, mode)), (image.size, size, mode)


def test_very_long_pictures_cost_little_and_look_the_same():
    for shape in ((1, 2000), (2000, 1), (3, 4001)):
        pixels, whole = preprocess(noise(*shape), 48), in_one_piece(noise(*shape), 48, "crop")
        torch.testing.assert_close(pixels, whole, rtol=0, atol=0.05)  # 3 levels of 255
    wide, narrower = (preprocess(Image.new("RGB", (13_000 // k, 1300 // k), "white"), 48, "pad") for k in (1, 10))
    torch.testing.assert_close(wide, narrower)


def test_padding_is_the_mean_colour_and_crop_has_none():
    white = Image.new("RGB", (640, 480), "white")
    seam = 336 * 80 // 640  # the picture starts at row 42; bicubic blends two rows on either side
    fill = torch.tensor([(int(m * 255) / 255 - m) / s for m, s in zip(MEAN, STD, strict=True)])
    full = torch.tensor([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)])
    pad, crop = preprocess(white, 336, "pad"), preprocess(white, 336, "crop")
    for rows in (pad[:, : seam - 2], pad[:, 336 - seam + 2 :]):
        torch.testing.assert_close(rows, fill.view(3, 1, 1).expand_as(rows), rtol=0, atol=1e-6)
    middle = pad[:, seam + 2 : 336 - seam - 2]
    torch.testing.assert_close(middle, full.view(3, 1, 1).expand_as(middle), rtol=0, atol=1e-6)
    torch.testing.assert_close(crop, full.view(3, 1, 1).expand_as(crop), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (20_000, 20), (1, 1)], ids=str)
def test_extreme_shapes_and_tiny_pictures(shape, mode):
    pixels = preprocess(noise(*shape), 48, mode)
    assert pixels.shape == (3, 48, 48) and pixels.isfinite().all()


def test_unknown_mode_and_empty_picture():
    with pytest.raises(Error, match='"crop" or "pad"'):
        preprocess(noise(4, 4), 48, "square")
    with pytest.raises(Error, match="0x4"):
        preprocess(Image.new("RGB", (0, 4)), 48, "crop")


# ---------------------------------------------------------------- kinds of picture


def pixel(path) -> tuple:
    return open_image(path).getpixel((0, 0))


def test_alpha_is_dropped(tmp_path):
    Image.new("RGBA", (3, 3), (200, 100, 50, 0)).save(tmp_path / "a.png")
    Image.new("LA", (3, 3), (77, 0)).save(tmp_path / "la.png")
    assert pixel(tmp_path / "a.png") == (200, 100, 50)
    assert pixel(tmp_path / "la.png") == (77, 77, 77)


def test_grey_palette_and_cmyk_become_rgb(tmp_path):
    Image.new("L", (3, 3), 90).save(tmp_path / "l.png")
    Image.new("1", (3, 3), 1).save(tmp_path / "1.png")
    palette = Image.new("P", (3, 3), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "p.png", transparency=1)
    Image.new("CMYK", (3, 3), (255, 0, 0, 0)).save(tmp_path / "c.tif")
    assert pixel(tmp_path / "l.png") == (90, 90, 90)
    assert pixel(tmp_path / "1.png") == (255, 255, 255)
    assert pixel(tmp_path / "p.png") == (10, 20, 30)
    assert pixel(tmp_path / "c.tif") == (0, 255, 255)


@pytest.mark.parametrize("name", ["g.png", "g.tif", "g.pgm"])
def test_sixteen_bit_grey_is_scaled(tmp_path, name):
    Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(tmp_path / name)
    assert [open_image(tmp_path / name).getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]
    assert to_rgb(Image.fromarray(np.array([[256 * 7]], dtype=np.int32))).getpixel((0, 0)) == (7, 7, 7)


def test_preprocess_converts_by_itself():
    image = noise(60, 50)
    with_alpha = image.copy()
    with_alpha.putalpha(0)
    assert torch.equal(preprocess(with_alpha, 48, "pad"), preprocess(image, 48, "pad"))
    assert with_alpha.mode == "RGBA"  # the caller's picture stays as it was


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for name in ("a.gif", "a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **({"lossless": True}))
        assert pixel(tmp_path / name) == (255, 0, 0), name


def test_exif_orientation_only_where_asked(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees
    noise(30, 20).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (30, 20)
    assert open_image(tmp_path / "turned.jpg", exif=True).size == (20, 30)


def test_broken_exif_is_no_obstacle(tmp_path):
    noise(30, 20).save(tmp_path / "odd.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert open_image(tmp_path / "odd.jpg", exif=True).size == (30, 20)


# ---------------------------------------------------------------- bad files


def refused(path, match: str, by_header: bool = True) -> None:
    """Both readers refuse the file in one line that names it; damage past the header only the one that decodes."""
    for read in (open_image, check_image) if by_header else (open_image,):
        with pytest.raises(Error, match=match) as caught:
            read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_folder_empty_and_no_image(tmp_path):
    refused(tmp_path / "nothing.jpg", "does not exist")
    refused(tmp_path, "is not a file")
    (tmp_path / "zero.jpg").write_bytes(b"")
    refused(tmp_path / "zero.jpg", "0 bytes")
    (tmp_path / "text.jpg").write_text("<html>404</html>\n" * 50)
    refused(tmp_path / "text.jpg", "not an image")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.bmp", "a.tif"])
def test_truncated_files(tmp_path, name):
    noise(200, 100).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    assert check_image(tmp_path / name) == (200, 100)
    for kept in (len(data) * 2 // 3, 40, 9, 3, 1):
        (tmp_path / name).write_bytes(data[:kept])
        refused(tmp_path / name, "damaged|cannot be read|not an image", by_header=False)


def test_damaged_bytes_never_end_in_a_traceback(tmp_path):
    draw = random.Random(0)
    for name in ("a.jpg", "a.png", "a.gif", "a.webp", "a.tif", "a.bmp"):
        noise(40, 30).save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        for _ in range(40):
            damaged = bytearray(data)
            for _ in range(10):
                damaged[draw.randrange(len(data))] = draw.randrange(256)
            (tmp_path / name).write_bytes(damaged)
            try:
                open_image(tmp_path / name, exif=True)
            except Error as error:
                assert "\n" not in str(error)


def test_enormous_pictures_are_refused_by_their_header(tmp_path):
    for width, height in ((20_000, 20_000), (20_000, MAX_PIXELS // 20_000 + 1), (70_000, 10)):
        Image.new("1", (width, height)).save(tmp_path / "big.png")
        refused(tmp_path / "big.png", "too large")


def test_a_wide_picture_is_read_in_silence(tmp_path):
    path = tmp_path / "wide.png"
    Image.new("1", (20_000, 5_000)).save(path)  # 100 million pixels: Pillow alone would warn
    program = f"from nanollava.images import check_image; print(check_image({str(path)!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("(20000, 5000)\n", "")


def test_a_header_that_pillow_does_not_implement_is_refused(tmp_path):
    file = tmp_path / "flags.dds"
    Image.new("RGB", (8, 8)).save(file)
    content = bytearray(file.read_bytes())
    content[80:84] = b"\1\0\0\0"  # pixel format flags that mean nothing: Pillow raises NotImplementedError
    file.write_bytes(content)
    refused(file, "cannot be read", by_header=True)
