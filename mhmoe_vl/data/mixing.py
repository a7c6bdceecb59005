"""Mixup and CutMix (timm's, one draw a step), the same for any number of ranks and accumulated parts.

timm mixes sample *i* of a batch with sample *B - 1 - i*. Here neighbours in the order of samples are mixed, 0 with 1,
2 with 3: the order is random anyway, and neighbours never stand on two ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.mixup import cutmix_bbox_and_lam
from torch import Tensor

from ..errors import ConfigError
from .loader import StepDataset
from .transforms import global_draws_from


class Mix(NamedTuple):
    """How the pictures of a step are mixed.

    Attributes:
        share: of a picture itself in what it becomes; the rest is its mate's.
        box: (top, bottom, left, right) that is the mate's (CutMix); none adds the two up (Mixup).
    """

    share: float
    box: tuple[int, int, int, int] | None

    def pictures(self, images: Tensor, mates: Tensor) -> Tensor:
        """``images (B, 3, H, W)`` mixed with ``images[mates]``; a picture that is its own mate stays as it is."""
        others = images[mates]
        if self.box is None:
            return torch.lerp(others, images, self.share)
        top, bottom, left, right = self.box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        return mixed


class Mixing(NamedTuple):
    """What mixes are drawn from.

    Attributes:
        mixup: both parameters of the Beta distribution of Mixup's shares; 0 is off.
        cutmix: the same of CutMix.
        prob: probability that a step is mixed at all.
        switch_prob: probability of CutMix where both are on.
    """

    mixup: float
    cutmix: float
    prob: float
    switch_prob: float

    def draw(self, rng: np.random.Generator, img_size: tuple[int, int]) -> Mix:
        """The mix of a step."""
        if rng.random() >= self.prob:
            return Mix(1.0, None)
        cut = self.cutmix > 0 and (self.mixup == 0 or rng.random() < self.switch_prob)
        share = float(rng.beta(*[self.cutmix if cut else self.mixup] * 2))
        if not cut:
            return Mix(share, None)
        with global_draws_from(rng):
            box, share = cutmix_bbox_and_lam((3, *img_size), share)
        return Mix(float(share), tuple(map(int, box)))


class MixedSteps(StepDataset):
    """A :class:`StepDataset` whose examples are dicts and get ``paired``: whether a neighbour is there to mix with.

    Every batch gets the ``mix`` of its step, a function of (seed, step) alone.

    Raises:
        ConfigError: the batch size is no multiple of twice the parts of a step.
    """

    def __init__(
        self,
        streams: Mapping[str, Any],
        collate: Callable[[dict[str, list[Any]]], Any],
        *,
        mixing: Mixing,
        img_size: tuple[int, int],
        **place: int,
    ) -> None:
        super().__init__(streams, collate, **place)
        self.mixing, self.img_size = mixing, img_size
        parts = 2 * self.accumulate * self.world
        for stream in self.streams.values():
            if stream.batch_size % parts:
                what = (
                    f"{stream.batch_size} is no multiple of {parts} (2 x {self.world} ranks x {self.accumulate} parts)"
                )
                raise ConfigError(f"task.batch_size: {what}: mixup and cutmix take pairs (change it)")

    def __getitem__(self, step: int) -> list[Any]:
        mix = self.mixing.draw(np.random.default_rng([self.seed, step, 2]), self.img_size)
        return [replace(part, mix=mix) for part in super().__getitem__(step)]

    def _examples(self, name: str, positions: range, bad: Any) -> list[dict[str, Any]]:
        found = []
        for first in positions[::2]:
            pair = super()._examples(name, range(first, first + 2), bad)
            found += [{**example, "paired": len(pair) == 2} for example in pair]
        return found
