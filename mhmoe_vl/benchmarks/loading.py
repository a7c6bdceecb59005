"""From a shard of JPEGs to random crops of 224 pixels: our path with all its checks, and the usual one by PIL."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from ..data.loader import sample_rng
from ..data.manifest import make_manifest
from ..data.shards import ShardSet
from ..data.transforms import ImageTransform, random_box
from ..data.writing import write_shard

CROP, MIN_CROP = 224, 0.2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_pictures(folder: Path, count: int, size: tuple[int, int] = (375, 500)) -> Path:
    """A shard of ``count`` JPEGs of quality 90 (about 50 kB at the default size) with its manifest."""
    shard, rng = folder / "pictures.tar", np.random.default_rng(0)
    write_shard(shard, [(f"{i:06d}", {"jpg": _picture(rng, size)}) for i in range(count)])
    make_manifest(shard)
    return shard


def _picture(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    """Soft colours with detail at three scales, as photographs have."""
    height, width = size
    pixels = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((6, 90), (48, 25), (190, 12)):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        pixels += (
            (np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) - 128) * strength / 100
        )
    file = io.BytesIO()
    Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=90)
    return file.getvalue()


def make_loaders(shard: Path) -> dict[str, Callable[[], list[Tensor]]]:
    """Functions that deliver all pictures of the shard once.

    * ``ours``: read by the manifest with checksum, header checked, decoded, cropped, uint8.
    * ``pil``: the same bytes from memory, nothing checked: PIL decoding, crop, resize, to float, normalised.
    """
    source, transform = ShardSet([str(shard)]), ImageTransform(
        CROP, train=True, min_crop=MIN_CROP, flip=0.5, color_jitter=0.0
    )  # fmt: skip
    encoded = [source[number].image() for number in range(len(source))]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def ours() -> list[Tensor]:
        return [transform(source[i].image(), sample_rng(0, 0, i)) for i in range(len(source))]

    def pil() -> list[Tensor]:
        return [(_pil_crop(data, sample_rng(0, 0, i)) - mean) / std for i, data in enumerate(encoded)]

    return {"ours": ours, "pil": pil}


def _pil_crop(data: bytes, rng: np.random.Generator) -> Tensor:
    """The same draws as :class:`~mhmoe_vl.data.transforms.ImageTransform`."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    box = random_box(image.height, image.width, MIN_CROP, rng)
    flipped = rng.random() < 0.5
    image = functional.resized_crop(image, *box, [CROP, CROP], interpolation=InterpolationMode.BICUBIC, antialias=True)
    image = functional.horizontal_flip(image) if flipped else image
    return functional.to_dtype(functional.pil_to_tensor(image), torch.float32, scale=True)


def difference(ours: Tensor, pil: Tensor) -> float:
    """Mean difference of two crops in levels of 255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return float((ours.float() - 255 * (pil * std + mean)).abs().mean())
