"""Decoding against hand-made pictures and PIL; crops, jitter and RandAugment against their definition."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from mhmoe_vl.data.loader import sample_rng
from mhmoe_vl.data.sample import BadSample
from mhmoe_vl.data.transforms import (
    ImageTransform,
    _from_pil,
    center_box,
    decode_image,
    global_draws_from,
    random_box,
)
from mhmoe_vl.errors import ConfigError


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


def test_draws_without_rand_augment_stay_as_they_were() -> None:
    """A sample's masks are drawn after its picture, from the same generator."""
    used, expected = np.random.default_rng(3), np.random.default_rng(3)
    ImageTransform(32, train=True)(encode(picture(200, 150)), used)
    random_box(150, 200, 0.2, expected)
    expected.random(), expected.permutation(3), expected.random(3)
    assert used.random() == expected.random()


# ------------------------------------------------------------------------------- whole pictures and regions
def test_the_whole_picture_is_resized_whatever_its_shape() -> None:
    image = picture(400, 300)
    expected = torch.from_numpy(np.array(image.resize((96, 64), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    got = ImageTransform((64, 96), whole=True)(encode(image), None)
    assert (got.int() - expected.int()).abs().max() <= 1
    options = {"train": True, "flip": 0.0, "color_jitter": 0.0, "whole": True}
    rng = np.random.default_rng(0)
    assert torch.equal(ImageTransform((64, 96), min_crop=1.0, **options)(encode(image), rng), got)
    assert not torch.equal(ImageTransform((64, 96), min_crop=0.5, **options)(encode(image), rng), got)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_region_is_like_a_picture_of_its_own(train: bool, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: regions are of the upright picture
    data = encode(picture(200, 150), form, exif=exif)
    upright = Image.fromarray(decode_image(data).permute(1, 2, 0).numpy())
    assert upright.size == (150, 200)
    alone = encode(upright.crop((10, 60, 130, 160)))
    transform = ImageTransform(48, train=train)
    whole, region = (sample_rng(0, 0, 7) for _ in range(2))
    assert torch.equal(transform(data, region, (60, 10, 100, 120)), transform(alone, whole))


@pytest.mark.parametrize("region", [(-1, 0, 5, 5), (0, -1, 5, 5), (44, 0, 5, 5), (0, 60, 5, 5), (0, 0, 0, 5)])
def test_a_region_outside_the_picture_is_a_bad_sample(region: tuple[int, int, int, int]) -> None:
    assert ImageTransform(8)(encode(picture(64, 48)), None, (43, 59, 5, 5)).shape == (3, 8, 8)
    with pytest.raises(BadSample, match=r"region .* of a picture of 64 x 48 pixels") as caught:
        ImageTransform(8)(encode(picture(64, 48)), None, region)
    assert caught.value.reason == "region"


# --------------------------------------------------------------------------------------------- RandAugment
def one_operation_of_magnitude_7(image: Image.Image) -> dict[str, list[Image.Image]]:
    """What each of BEiT-3's operations makes of a picture, in both directions where it has two."""

    def moved(*matrix: float) -> Image.Image:
        fill = (128, 128, 128)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill)

    def turned(degrees: float) -> Image.Image:
        return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))

    return {
        "identity": [image],
        "AutoContrast": [ImageOps.autocontrast(image)],
        "Equalize": [ImageOps.equalize(image)],
        "Brightness": [ImageEnhance.Brightness(image).enhance(1.36)],
        "Sharpness": [ImageEnhance.Sharpness(image).enhance(1.36)],
        "ShearX": [moved(1, way * 0.21, 0, 0, 1, 0) for way in (1, -1)],
        "ShearY": [moved(1, 0, 0, way * 0.21, 1, 0) for way in (1, -1)],
        "TranslateX": [moved(1, 0, way * 7, 0, 1, 0) for way in (1, -1)],
        "TranslateY": [moved(1, 0, 0, 0, 1, way * 7) for way in (1, -1)],
        "Rotate": [turned(way * 21) for way in (1, -1)],
    }


def test_rand_augment_does_one_of_nine_operations_after_the_rest() -> None:
    data = encode(picture(90, 70))
    plain, augmented = ImageTransform(40, train=True), ImageTransform(40, train=True, rand_augment_ops=1)
    found: dict[tuple[str, int], int] = {}
    for number in range(1000):
        before, after = (transform(data, sample_rng(0, 0, number)) for transform in (plain, augmented))
        known = one_operation_of_magnitude_7(Image.fromarray(before.permute(1, 2, 0).numpy()))
        after = after.permute(1, 2, 0).numpy()
        name = next((n, i) for n, made in known.items() for i, one in enumerate(made) if np.array_equal(one, after))
        found[name] = found.get(name, 0) + 1
    assert len(found) == 15
    assert abs(found[("identity", 0)] / 1000 - 0.55) < 0.05
    for operation in list(known)[1:]:
        share = sum(count for (name, _), count in found.items() if name == operation) / 1000
        assert abs(share - 0.05) < 0.025, operation


def test_magnitude_and_number_of_operations() -> None:
    data = encode(picture(40, 40))
    options = {"train": True, "whole": True, "min_crop": 1.0, "flip": 0.0, "color_jitter": 0.0}
    plain = ImageTransform(40, **options)(data, np.random.default_rng(0))

    def unchanged(**augment: int) -> float:
        transform = ImageTransform(40, **options, **augment)
        return np.mean([torch.equal(transform(data, sample_rng(0, 0, number)), plain) for number in range(600)])

    assert abs(unchanged(rand_augment_ops=2) - 0.55**2) < 0.05
    # Without strength shears, shifts and turns do nothing; contrast, equalising, brightness and sharpness still do.
    assert abs(unchanged(rand_augment_ops=1, rand_augment_magnitude=0) - 0.8) < 0.05


def test_rand_augment_is_a_function_of_seed_epoch_and_sample() -> None:
    data = encode(picture(200, 150))
    transform = ImageTransform((24, 32), train=True, rand_augment_ops=2)
    places = [(seed, epoch, sample) for seed in range(2) for epoch in range(2) for sample in range(20)]
    first = {place: transform(data, sample_rng(*place)) for place in places}
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    second = {place: transform(data, sample_rng(*place)) for place in reversed(places)}
    assert all(torch.equal(first[place], second[place]) for place in places)
    assert len({image.numpy().tobytes() for image in first.values()}) == len(places)
    assert {image.shape for image in first.values()} == {(3, 24, 32)}


def test_rand_augment_leaves_the_global_generators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = ImageTransform(24, train=True, rand_augment_ops=2)
    random.seed(4)
    np.random.seed(4)
    python, numpys, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def untouched() -> bool:
        same = all(map(np.array_equal, np.random.get_state(), numpys))
        return same and random.getstate() == python and torch.equal(torch.get_rng_state(), torchs)

    for number in range(30):
        transform(encode(picture(50, 50)), sample_rng(0, 0, number))
        assert untouched()

    def fails(image: Image.Image) -> None:
        random.random(), np.random.random()
        raise ValueError("an operation failed")

    monkeypatch.setattr(transform, "rand_augment", fails)
    with pytest.raises(ValueError, match="an operation failed"):
        transform(encode(picture(50, 50)), sample_rng(0, 0, 0))
    assert untouched()


def test_rand_augment_is_refused_with_two_sizes() -> None:
    for options in ({"rand_augment_ops": 2}, {"policy": "rand-m9"}, {"erase_prob": 0.5}):
        with pytest.raises(ConfigError, match=r"RandAugment or erasing with .* \(48, 48\) and \(24, 24\)"):
            ImageTransform(48, second_size=24, train=True, **options)
    large, same = ImageTransform(48, second_size=48, train=True, rand_augment_ops=2)(
        encode(picture()), np.random.default_rng(0)
    )
    assert torch.equal(large, same)


# --------------------------------------------------------------------- as timm's recipes classify pictures
PLAIN = {"train": True, "whole": True, "min_crop": 1.0, "flip": 0.0, "color_jitter": 0.0}


def test_a_policy_is_the_one_timm_makes_of_its_name() -> None:
    image = picture(48, 48)
    ours = ImageTransform(48, **PLAIN, policy="rand-m9-mstd0.5-inc1")
    options = {"translate_const": 21, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    theirs = rand_augment_transform("rand-m9-mstd0.5-inc1", options)
    for number in range(40):
        got = ours(encode(image), sample_rng(0, 0, number))
        rng = sample_rng(0, 0, number)
        random_draws = rng.random(), rng.permutation(3), rng.random(3)  # flip and jitter come first
        assert len(random_draws) == 3
        with global_draws_from(rng):
            wanted = theirs(image)
        assert np.array_equal(got.permute(1, 2, 0).numpy(), np.array(wanted))


@pytest.mark.parametrize("name", ["rand-x9", "augmix-m3", "rand", "m9", "rand-m9-z3"])
def test_an_unknown_policy_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"task\.augment\.policy: .* is no RandAugment of timm"):
        ImageTransform(48, policy=name)


def test_erasing_puts_noise_of_imagenets_colours_into_one_box() -> None:
    grey = encode(Image.new("RGB", (64, 64), (10, 200, 90)))
    transform = ImageTransform(64, **PLAIN, erase_prob=0.25)
    changed, noise = [], []
    for number in range(400):
        image = transform(grey, sample_rng(0, 0, number))
        found = (image != torch.tensor([10, 200, 90], dtype=torch.uint8).view(3, 1, 1)).any(0)
        if found.any():
            rows, columns = found.any(1).nonzero().flatten(), found.any(0).nonzero().flatten()
            box = image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            changed.append(box[0].numel() / 64**2)
            noise.append(box.flatten(1).float())
    assert abs(len(changed) / 400 - 0.25) < 0.06
    assert min(changed) > 0.015 and max(changed) < 0.35
    pixels = torch.cat(noise, 1) / 255  # clipped to 0 .. 1, which takes little off the spread
    assert (pixels.mean(1) - torch.tensor([0.485, 0.456, 0.406])).abs().max() < 0.02
    assert (pixels.std(1) - torch.tensor([0.229, 0.224, 0.225])).abs().max() < 0.03


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (257, 257)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_evaluation_is_that_of_timm(size: tuple[int, int], crop_pct: float) -> None:
    image = picture(*size)
    theirs = create_transform(96, interpolation="bicubic", crop_pct=crop_pct, mean=(0, 0, 0), std=(1, 1, 1))
    got, wanted = ImageTransform(96, crop_pct=crop_pct)(encode(image), None) / 255, theirs(image)
    # timm resizes and then crops, which rounds size and place of the crop; another crop is far off.
    assert (got - wanted).abs().mean() < 0.015
    assert (ImageTransform(96, crop_pct=0.94)(encode(image), None) / 255 - wanted).abs().mean() > 0.02


def test_policy_and_erasing_are_functions_of_the_sample_alone() -> None:
    transform = ImageTransform(32, train=True, policy="rand-m9-mstd0.5-inc1", erase_prob=1.0)
    data, before = encode(picture(90, 70)), torch.get_rng_state()
    first = [transform(data, sample_rng(1, 0, number)) for number in range(10)]
    random.seed(7), np.random.seed(7)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(transform(data, sample_rng(1, 0, number)), first[number]) for number in reversed(range(10)))
    assert len({image.numpy().tobytes() for image in first}) == 10
