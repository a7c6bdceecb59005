"""Large-scale jitter and flips of pictures with their boxes and masks, from a given generator."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

MIN_SIDE = 1.0
"""Pixels that a box must have to a side to be kept."""


class ScaleJitter:
    """Scale, crop and flip a picture with what is known of it (Ghiasi et al. 2021).

    In training the picture is brought to ``min_scale .. max_scale`` times the size at which it just fits into
    ``img_size``, cut at random to ``img_size`` where it is larger, and perhaps flipped. In evaluation it just fits.
    Nothing is padded here.

    Args:
        img_size: (height, width) in pixels.
        train: whether to draw at random.
        min_scale, max_scale: of the scale, drawn uniformly.
        flip: probability of a horizontal flip.
    """

    def __init__(
        self, img_size: tuple[int, int], *, train: bool, min_scale: float, max_scale: float, flip: float
    ) -> None:
        self.img_size, self.train, self.flip = img_size, train, flip
        self.min_scale, self.max_scale = min_scale, max_scale

    def __call__(
        self, image: Tensor, boxes: Tensor, masks: Tensor | None, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The picture, its boxes and masks, and which of them are left; the others are cut away.

        Args:
            image: uint8 ``(3, H, W)``.
            boxes: ``(n, 4)`` as x1, y1, x2, y2.
            masks: uint8 ``(n, H, W)``, or none.
            rng: the only source of chance; not used in evaluation.
        """
        canvas = (image.shape[1], image.shape[2])
        parts = [tv_tensors.Image(image), tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=canvas)]
        parts += [] if masks is None else [tv_tensors.Mask(masks)]
        size = self._size(*canvas, rng)
        parts = [functional.resize(part, list(size)) for part in parts]
        if self.train:
            height, width = (min(side, limit) for side, limit in zip(size, self.img_size, strict=True))
            top, left = rng.integers(0, size[0] - height + 1), rng.integers(0, size[1] - width + 1)
            parts = [functional.crop(part, int(top), int(left), height, width) for part in parts]
            if rng.random() < self.flip:
                parts = [functional.horizontal_flip(part) for part in parts]
        image, boxes, *rest = parts
        boxes = functional.clamp_bounding_boxes(boxes).as_subclass(Tensor)
        kept = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(dim=1)
        masks = rest[0].as_subclass(Tensor) if rest else None
        if masks is not None:
            kept &= masks.bool().flatten(1).any(dim=1)
            masks = masks[kept]
        return image.as_subclass(Tensor), boxes[kept], masks, torch.where(kept)[0]

    def _size(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int]:
        scale = rng.uniform(self.min_scale, self.max_scale) if self.train else 1.0
        factor = scale * min(self.img_size[0] / height, self.img_size[1] / width)
        return max(1, round(height * factor)), max(1, round(width * factor))
