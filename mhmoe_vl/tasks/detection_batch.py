"""Batches of pictures of different sizes with the objects in them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import Record

GREY = 128
"""What pictures are padded with."""


@dataclass(frozen=True)
class DetectionBatch:
    """Pictures, each in the upper left corner of its place, with their objects.

    Attributes:
        images: ``(B, 3, H, W)`` uint8, after ``prepare`` normalised float; H and W are whole patches.
        sizes: height and width of each picture in pixels.
        targets: of each picture ``boxes``, ``labels`` and perhaps ``masks``, see :data:`~..models.detector.Target`;
            empty in evaluation.
        seeds: what is sampled in each picture depends on.
        records: what is known of each picture.
        bad: examples left out, by reason.
    """

    images: Tensor
    sizes: list[tuple[int, int]]
    targets: list[dict[str, Tensor]]
    seeds: list[int]
    records: list[Record]
    bad: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def prepared(self, device: torch.device) -> DetectionBatch:
        """The batch on ``device``, pictures in [-1, 1]."""
        targets = [{name: value.to(device) for name, value in target.items()} for target in self.targets]
        return replace(self, images=self.images.to(device).float() / 127.5 - 1, targets=targets)

    def padding(self, patch_size: int) -> Tensor | None:
        """``(B, rows, columns)`` bool, True where a patch has nothing of the picture; none where there is no such."""
        rows, columns = (torch.arange(side // patch_size, device=self.images.device) for side in self.images.shape[2:])
        ends = map_sizes(self.sizes, patch_size)
        if ends == [(len(rows), len(columns))] * len(self):
            return None
        bottom, right = torch.tensor(ends, device=self.images.device).T[:, :, None]
        return (rows >= bottom)[:, :, None] | (columns >= right)[:, None, :]


def map_sizes(sizes: list[tuple[int, int]], patch_size: int) -> list[tuple[int, int]]:
    """Rows and columns of patches that pictures of these sizes have a part in."""
    return [(-(-height // patch_size), -(-width // patch_size)) for height, width in sizes]


def collate(examples: list[dict[str, Any]], *, patch_size: int) -> DetectionBatch:
    """A batch of examples (``image``, ``target``, ``seed``, ``record``), which may be none."""
    sizes = [(example["image"].shape[1], example["image"].shape[2]) for example in examples]
    rows, columns = np.max([(1, 1), *map_sizes(sizes, patch_size)], axis=0)
    images = torch.full((len(examples), 3, rows * patch_size, columns * patch_size), GREY, dtype=torch.uint8)
    for place, example in zip(images, examples, strict=True):
        height, width = example["image"].shape[1:]
        place[:, :height, :width] = example["image"]
    parts = ([example[name] for example in examples] for name in ("target", "seed", "record"))
    return DetectionBatch(images, sizes, *parts)
