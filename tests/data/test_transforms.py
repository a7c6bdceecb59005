"""Decoding against hand-made pictures and PIL; crops and jitter against their definition."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from mhmoe_vl.data.sample import BadSample
from mhmoe_vl.data.transforms import ImageTransform, _from_pil, center_box, decode_image, random_box


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def picture(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """Smooth random colours, so that JPEG and resizing lose little."""
    grid = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)


def pixel(data: bytes) -> list[int]:
    decoded = decode_image(data)
    assert decoded.dtype == torch.uint8
    return decoded[:, 0, 0].tolist()


# --------------------------------------------------------------------------------------------- decoding
def test_png_and_lossless_webp_give_the_pixels() -> None:
    expected = torch.from_numpy(np.array(picture())).permute(2, 0, 1)
    assert torch.equal(decode_image(encode(picture())), expected)
    assert torch.equal(decode_image(encode(picture(), "WEBP", lossless=True)), expected)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"quality": 50, "subsampling": 0}, {"progressive": True}])
def test_both_jpeg_decoders_agree(mode: str, options: dict) -> None:
    data = encode(picture(161, 97).convert(mode), "JPEG", **options)
    assert torch.equal(decode_image(data), _from_pil(Image.open(io.BytesIO(data))))


def test_both_jpeg_decoders_agree_on_photos(data_dir: Path) -> None:
    files = sorted((data_dir / "flickr8k_1k" / "images").glob("*.jpg"))[:40]
    assert files
    for file in files:
        data = file.read_bytes()
        assert torch.equal(decode_image(data), _from_pil(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.zeros((40, 80, 3), dtype=np.uint8)
    stored[:16, :16] = 255  # white square at the top left as stored
    decoded = decode_image(encode(Image.fromarray(stored), form, exif=exif))
    corner = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[orientation]
    assert decoded.shape == ((3, 80, 40) if orientation > 4 else (3, 40, 80))
    rows, columns = {"t": slice(0, 12), "b": slice(-12, None)}, {"l": slice(0, 12), "r": slice(-12, None)}
    assert decoded[:, rows[corner[0]], columns[corner[1]]].min() > 240
    assert decoded.float().mean() < 255 * 0.12


def test_colour_modes_give_the_right_colours() -> None:
    assert pixel(encode(Image.new("L", (8, 8), 77))) == [77, 77, 77]
    assert pixel(encode(Image.new("1", (8, 8), 1))) == [255, 255, 255]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(encode(palette)) == [10, 20, 30]
    assert pixel(encode(palette, transparency=1)) == [255, 255, 255]
    assert pixel(encode(Image.new("RGBA", (8, 8), (10, 20, 30, 255)))) == [10, 20, 30]
    assert pixel(encode(Image.new("RGBA", (8, 8), (10, 20, 30, 0)))) == [255, 255, 255]
    half = pixel(encode(Image.new("RGBA", (8, 8), (100, 0, 200, 128))))
    assert np.abs(np.array(half) - [177, 127, 227]).max() <= 1
    assert pixel(encode(Image.new("LA", (8, 8), (50, 255)))) == [50, 50, 50]
    red = pixel(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert red[0] > 245 and max(red[1:]) < 10


def test_16_bit_grey_is_scaled() -> None:
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    decoded = decode_image(encode(Image.fromarray(ramp)))
    assert torch.equal(decoded[0].reshape(-1), torch.arange(256, dtype=torch.uint8))
    assert torch.equal(decoded[0], decoded[2])


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert pixel(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)) == [255, 0, 0]


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    body = zlib.compress(bytes(1000))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(13_000, 13_000), (100_000, 1), (1, 16_385), (30_000, 30_000)])
def test_size_is_checked_before_decoding(width: int, height: int) -> None:
    tracemalloc.start()
    with pytest.raises(BadSample, match="picture") as caught:
        decode_image(png_header(width, height))
    assert caught.value.reason == "image size"
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_damaged_and_foreign_files_are_bad_samples() -> None:
    jpeg, png = encode(picture(), "JPEG"), encode(picture())
    cut = [jpeg[:n] for n in (0, 1, 20, 200, len(jpeg) // 2, len(jpeg) - 2)]
    cut += [png[:n] for n in (10, 60, len(png) // 2)]
    foreign = [encode(picture(), form) for form in ("BMP", "TIFF", "GIF", "PPM", "EPS")]
    for data in [*cut, *foreign, b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0", bytes(100), png_header(0, 5)]:
        with pytest.raises(BadSample) as caught:
            decode_image(data)
        assert caught.value.reason in ("image", "image size")


# ------------------------------------------------------------------------------------------- transforms
def test_training_crops_have_the_stated_areas_and_aspects() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(300, 400, 0.2, rng) for _ in range(4000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (top + height <= 300).all() and (left >= 0).all() and (left + width <= 400).all()
    share = height * width / 120_000
    assert 0.19 < share.min() < 0.22 and share.max() > 0.95
    assert 0.73 < (width / height).min() < 0.76 and 1.31 < (width / height).max() < 1.36
    assert abs(np.log(width / height).mean()) < 0.05
    assert random_box(10, 1000, 1.0, rng) == (0, (1000 - 13) // 2, 10, 13)


def test_center_box() -> None:
    assert center_box(300, 400, 1.0) == (0, 50, 300, 300)
    assert center_box(400, 300, 2.0) == (125, 0, 150, 300)
    assert center_box(1, 500, 0.5) == (0, 249, 1, 1)


def test_evaluation_is_the_resized_centre() -> None:
    image = picture(400, 300)
    expected = image.resize((96, 96), Image.Resampling.BICUBIC, box=(50, 0, 350, 300))
    got = ImageTransform(96)(encode(image), np.random.default_rng(0))
    assert got.shape == (3, 96, 96) and got.dtype == torch.uint8
    difference = got.int() - torch.from_numpy(np.array(expected)).permute(2, 0, 1).int()
    assert difference.abs().max() <= 1
    assert ImageTransform((32, 64))(encode(image), None).shape == (3, 32, 64)


def test_training_without_chance_left_is_a_plain_resize() -> None:
    square = picture(90, 90)
    transform = ImageTransform(64, train=True, min_crop=1.0, flip=1.0, color_jitter=0.0)
    boxes = [transform(encode(square), np.random.default_rng(seed)) for seed in range(3)]
    plain = functional.resize(decode_image(encode(square)), [64, 64], InterpolationMode.BICUBIC, antialias=True)
    assert any(torch.equal(got, plain.flip(-1)) for got in boxes)


def test_randomness_comes_from_the_generator_alone() -> None:
    transform = ImageTransform(32, train=True)
    data = encode(picture(200, 150))
    torch.manual_seed(0)
    np.random.seed(0)
    first = [transform(data, np.random.default_rng(seed)) for seed in (1, 2)]
    torch.manual_seed(5)
    second = [transform(data, np.random.default_rng(seed)) for seed in (1, 2)]
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], first[1])


def test_two_sizes_show_the_same_crop_flip_and_jitter() -> None:
    transform = ImageTransform(48, second_size=24, train=True)
    for seed in range(10):
        large, small = transform(encode(picture(300, 200, seed)), np.random.default_rng(seed))
        shrunk = functional.resize(large, [24, 24], InterpolationMode.BICUBIC, antialias=True)
        assert (shrunk.int() - small.int()).abs().float().mean() < 2.0
    large, same = ImageTransform(48, second_size=48, train=True)(encode(picture()), np.random.default_rng(0))
    assert torch.equal(large, same)


def test_jitter_has_the_stated_range() -> None:
    grey = encode(Image.new("RGB", (8, 8), (100, 100, 100)))
    transform = ImageTransform(8, train=True, color_jitter=0.4)
    levels = np.array([transform(grey, np.random.default_rng(seed))[0, 0, 0].item() for seed in range(600)])
    # On plain grey only brightness shows; each of the three steps rounds down.
    assert 57 <= levels.min() <= 62 and 136 <= levels.max() <= 140
    assert abs(levels.mean() - 99) < 4
