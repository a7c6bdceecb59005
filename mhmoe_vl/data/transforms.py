"""From encoded pictures to uint8 tensors: safe decoding; crops, jitter, RandAugment, erasing from a given generator."""

from __future__ import annotations

import contextlib
import io
import math
import random
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from ..errors import ConfigError, one_line
from .sample import BadSample

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = {"JPEG": 25_000_000, "PNG": 25_000_000, "WEBP": 15_000_000}
"""By format, so that decoding takes at most 300 MiB: a progressive JPEG needs 10 bytes a pixel, a WebP picture 17."""
BAND = 256
"""Rows that are converted at a time."""
MAX_SIDE = 16_384
CROP_ASPECT = (3 / 4, 4 / 3)
CROP_TRIES = 10
RAND_AUGMENT = (
    "AutoContrast",
    "Equalize",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
)
"""BEiT-3's operations (randaug.py) without the identity, in timm's names."""
RAND_AUGMENT_PROB = 0.45
"""BEiT-3 does one of ten operations, the identity among them, with probability 0.5; of nine this is the same."""
RAND_AUGMENT_OPTIONS = {
    "translate_const": 10,  # pixels at magnitude 10
    "img_mean": (128, 128, 128),
    "interpolation": Image.Resampling.BILINEAR,
}

POLICY_OPTIONS = {
    "img_mean": tuple(round(255 * value) for value in IMAGENET_DEFAULT_MEAN),
    "interpolation": Image.Resampling.BICUBIC,
}
"""Of a RandAugment policy by timm's name, as timm's own recipes set them."""
TRANSLATED_SHARE = 0.45
"""of the shorter side, at full strength (timm)"""

_ADJUST = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
Box = tuple[int, int, int, int]


# --------------------------------------------------------------------------------------------- decoding
def decode_image(data: bytes) -> Tensor:
    """Decode a JPEG, PNG or WebP picture into uint8 (3, H, W), upright, in RGB.

    The format is that of the content, whatever the name said. Sizes are checked from the header before anything is
    decoded: at most :data:`MAX_PIXELS` and 16,384 to a side. The EXIF orientation is applied; transparent pixels are
    laid over white; 16-bit grey is scaled, not clipped; of an animation the first frame is taken; colour profiles
    are not applied.

    Raises:
        BadSample: reason ``"image"`` (damaged, cut, another format) or ``"image size"``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on odd metadata, and its own size warning
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(image)
                if image.format == "JPEG" and image.mode in ("RGB", "L"):
                    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                    return decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
                return _from_pil(image)
    except Image.DecompressionBombError as error:
        raise BadSample(f"picture too large: {error}", reason="image size") from error
    except BadSample:
        raise
    except Exception as error:  # decoders of hostile bytes raise nearly anything
        unknown = isinstance(error, Image.UnidentifiedImageError)
        what = "not a JPEG, PNG or WebP picture" if unknown else "damaged picture"
        raise BadSample(f"{what}: {type(error).__name__}, {len(data)} bytes", reason="image") from error


def _check_size(image: Image.Image) -> None:
    (width, height), most = image.size, MAX_PIXELS[image.format]
    if not 0 < width * height <= most or max(width, height) > MAX_SIDE:
        what = f"picture of {width} x {height} pixels (at most {most} in all and {MAX_SIDE} to a side)"
        raise BadSample(what, reason="image size")


def _from_pil(image: Image.Image) -> Tensor:
    ImageOps.exif_transpose(image, in_place=True)
    width, height = image.size
    pixels = torch.empty(3, height, width, dtype=torch.uint8)
    for top in range(0, height, BAND):
        bottom = min(top + BAND, height)
        band = _to_rgb(image.crop((0, top, width, bottom)))
        pixels[:, top:bottom] = torch.from_numpy(np.array(band)).permute(2, 0, 1)
    return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((grey.clip(0, 65535) * 255 + 32767) // 65535).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ------------------------------------------------------------------------------------------- transforms
class ImageTransform:
    """Crop, flip, jitter and resize one picture (bicubic, antialiased); uint8 in, uint8 out.

    In training: a random crop of ``min_crop`` to all of the area with aspect 3/4 to 4/3, then a horizontal flip, then
    brightness, contrast and saturation each times ``1 - color_jitter .. 1 + color_jitter`` in random order, then
    RandAugment, then random erasing. In evaluation: the largest centred crop of the output's shape. With
    ``second_size`` the same crop, flip and jitter come in two sizes, one for the model and one for its visual
    tokenizer.

    RandAugment is timm's: with BEiT-3's operations and ranges for pairs (each of ``rand_augment_ops`` draws is one of
    :data:`RAND_AUGMENT`, done with probability 0.45; BEiT-3's setting is 2 operations of magnitude 7), or one of
    timm's policies by name (``policy``). Random erasing is timm's too: with ``erase_prob`` a box becomes normal noise
    with ImageNet's mean and standard deviation.

    Args:
        img_size: pixels, or (height, width).
        second_size: of the second output; none gives a single one.
        train: whether to draw at random.
        min_crop: smallest share of the area that a random crop keeps.
        flip: probability of a flip.
        color_jitter: strength of the jitter.
        rand_augment_ops: operations of RandAugment; 0 is off.
        rand_augment_magnitude: their strength, 0 to 10.
        policy: a RandAugment of timm, such as ``rand-m9-mstd0.5-inc1``, instead.
        erase_prob: probability of erasing a box.
        crop_pct: side of the centred crop in evaluation, over that of the largest one.
        whole: no crop in evaluation, nor in training when ``min_crop`` is 1: the whole picture is resized to the
            output's shape, whatever its own.

    Raises:
        ConfigError: RandAugment or erasing together with a second size, because they act on pixels; an unknown policy.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        *,
        second_size: int | tuple[int, int] | None = None,
        train: bool = False,
        min_crop: float = 0.2,
        flip: float = 0.5,
        color_jitter: float = 0.4,
        rand_augment_ops: int = 0,
        rand_augment_magnitude: float = 7.0,
        policy: str | None = None,
        erase_prob: float = 0.0,
        crop_pct: float = 1.0,
        whole: bool = False,
    ) -> None:
        self.img_size = _pair(img_size)
        self.second_size = None if second_size is None else _pair(second_size)
        self.train, self.min_crop, self.flip, self.color_jitter = train, min_crop, flip, color_jitter
        self.rand_augment = _rand_augment(rand_augment_ops, rand_augment_magnitude) if rand_augment_ops else None
        if policy is not None:
            self.rand_augment = _policy(policy, min(self.img_size))
        self.erase = RandomErasing(erase_prob, mode="pixel", device="cpu") if erase_prob else None
        self.crop_pct, self.whole = crop_pct, whole
        if (self.rand_augment or self.erase) and self.second_size not in (None, self.img_size):
            sizes = f"pictures of two sizes, {self.img_size} and {self.second_size}"
            raise ConfigError(f"task.augment: RandAugment or erasing with {sizes} (switch them off)")

    def __call__(
        self, data: bytes, rng: np.random.Generator, region: Box | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The picture as uint8 (3, H, W), or a pair of these when there is a ``second_size``.

        Args:
            data: encoded picture.
            rng: the only source of chance; not used in evaluation.
            region: (top, left, height, width) in pixels of the upright picture, cut out before all else; none takes
                all of it.

        Raises:
            BadSample: the picture cannot be decoded, or the region is not inside it.
        """
        image = decode_image(data)
        if region is not None:
            image = _cut(image, region)
        box = self._box(*image.shape[1:], rng)
        if not self.train:
            return self._sized(lambda size: _resized(image, box, size))
        flipped = rng.random() < self.flip
        low, high = max(0.0, 1 - self.color_jitter), 1 + self.color_jitter
        jitter = [(_ADJUST[i], rng.uniform(low, high)) for i in rng.permutation(len(_ADJUST))]

        def view(size: tuple[int, int]) -> Tensor:
            result = _resized(image, box, size)
            result = functional.horizontal_flip(result) if flipped else result
            for adjust, factor in jitter if self.color_jitter else ():
                result = adjust(result, factor)
            result = self._augmented(result, rng) if self.rand_augment else result
            return self._erased(result, rng) if self.erase else result

        return self._sized(view)

    def _box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        if self.whole and (not self.train or self.min_crop == 1):
            return 0, 0, height, width
        if self.train:
            return random_box(height, width, self.min_crop, rng)
        top, left, h, w = center_box(height, width, self.img_size[1] / self.img_size[0])
        inner_h, inner_w = (max(1, round(side * self.crop_pct)) for side in (h, w))
        return top + (h - inner_h) // 2, left + (w - inner_w) // 2, inner_h, inner_w

    def _augmented(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        with global_draws_from(rng):
            return functional.pil_to_tensor(self.rand_augment(functional.to_pil_image(image)))

    def _erased(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        with global_draws_from(rng):
            erased = self.erase((image - mean) / std)
        return (erased * std + mean).round().clamp(0, 255).to(torch.uint8)

    def _sized(self, view: Callable[[tuple[int, int]], Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        first = view(self.img_size)
        if self.second_size is None:
            return first
        return first, first if self.second_size == self.img_size else view(self.second_size)


def random_box(height: int, width: int, min_crop: float, rng: np.random.Generator) -> Box:
    """(top, left, height, width) of a random crop: area uniform, aspect log-uniform; centred after ten misfits."""
    for _ in range(CROP_TRIES):
        area = height * width * rng.uniform(min_crop, 1)
        aspect = math.exp(rng.uniform(math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    return center_box(height, width, min(max(width / height, CROP_ASPECT[0]), CROP_ASPECT[1]))


def center_box(height: int, width: int, aspect: float) -> Box:
    """(top, left, height, width) of the largest centred crop with ``aspect`` = width / height."""
    h = min(height, max(1, round(width / aspect)))
    w = min(width, max(1, round(height * aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def _rand_augment(num_ops: int, magnitude: float) -> auto_augment.RandAugment:
    ops = auto_augment.rand_augment_ops(magnitude, RAND_AUGMENT_PROB, RAND_AUGMENT_OPTIONS, list(RAND_AUGMENT))
    return auto_augment.RandAugment(ops, num_ops)


def _policy(name: str, side: int) -> auto_augment.RandAugment:
    options = POLICY_OPTIONS | {"translate_const": int(side * TRANSLATED_SHARE)}
    try:
        if not name.startswith("rand-"):
            raise ValueError("another kind of policy")
        return auto_augment.rand_augment_transform(name, options)
    except (AssertionError, KeyError, ValueError) as error:
        what = f"{one_line(name, 60)!r} is no RandAugment of timm"
        raise ConfigError(f"task.augment.policy: {what} (write it as rand-m9-mstd0.5-inc1)") from error


@contextlib.contextmanager
def global_draws_from(rng: np.random.Generator) -> Iterator[None]:
    """Inside, the module-wide generators of Python, NumPy and torch, which timm uses, follow ``rng``."""
    ours, numpys, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(rng.integers(2**32)))
    np.random.seed(rng.integers(2**32))
    torch.default_generator.manual_seed(int(rng.integers(2**32)))
    try:
        yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)
        torch.set_rng_state(torchs)


def _cut(image: Tensor, region: Box) -> Tensor:
    top, left, height, width = region
    if min(top, left) < 0 or min(height, width) < 1 or top + height > image.shape[1] or left + width > image.shape[2]:
        what = f"region {region} (top, left, height, width) of a picture of {image.shape[2]} x {image.shape[1]} pixels"
        raise BadSample(f"{what} is not inside it", reason="region")
    return image[:, top : top + height, left : left + width]


def _resized(image: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    return functional.resized_crop(image, *box, size, interpolation=InterpolationMode.BICUBIC, antialias=True)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
