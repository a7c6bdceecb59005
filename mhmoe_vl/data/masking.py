"""What masked prediction hides: blocks of patches and text tokens."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from ..errors import ConfigError

ASPECT = (0.3, 1 / 0.3)
TRIES = 10


def block_mask(height: int, width: int, num_masked: int, min_block: int, rng: np.random.Generator) -> np.ndarray:
    """Mask exactly ``num_masked`` patches of a grid in blocks (BEiT, algorithm 1; BEiT v2 masks 75 of 14 x 14).

    Until the count is reached: a block's area is uniform between ``min_block`` and what is left, its aspect
    log-uniform in [0.3, 1/0.3], its place uniform; it is taken when it fits inside the grid, adds at least one patch
    and no more than what is left. After ten blocks in a row that do not, single patches chosen at random fill the rest.

    Args:
        height: patches from top to bottom.
        width: patches from left to right.
        num_masked: 0 to ``height * width``.
        min_block: smallest area of a block in patches (the published value is 16 for 14 x 14).
        rng: the only source of chance.

    Returns:
        bool (height, width), true = masked.

    Raises:
        ConfigError: ``num_masked`` does not fit the grid, or ``min_block`` is not positive.
    """
    if not 0 <= num_masked <= height * width:
        raise ConfigError(f"num_masked: {num_masked} of a {height} x {width} grid (choose 0 to {height * width})")
    if min_block < 1:
        raise ConfigError(f"min_block: {min_block} patches (choose at least 1)")
    mask = np.zeros((height, width), dtype=bool)
    while (left := num_masked - int(mask.sum())) > 0:
        block = next(filter(None, (_try_block(mask, left, min_block, rng) for _ in range(TRIES))), None)
        if block is None:
            mask.reshape(-1)[rng.choice(np.flatnonzero(~mask), size=left, replace=False)] = True
        else:
            mask[block] = True
    return mask


def _try_block(mask: np.ndarray, left: int, min_block: int, rng: np.random.Generator) -> tuple[slice, slice] | None:
    """A random block, or none when it does not fit."""
    area = rng.uniform(min(min_block, left), max(min_block, left))
    aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if height >= mask.shape[0] or width >= mask.shape[1]:
        return None
    top, start = rng.integers(0, mask.shape[0] - height + 1), rng.integers(0, mask.shape[1] - width + 1)
    block = slice(top, top + height), slice(start, start + width)
    added = height * width - int(mask[block].sum())
    return block if 0 < added <= left else None


def text_mask(ids: Sequence[int], special_ids: Collection[int], ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Mask ``round(ratio * n)`` of the *n* ordinary tokens, at least one when there is any and the ratio is positive.

    Args:
        ids: one text.
        special_ids: never masked (begin, end, padding).
        ratio: 0 to 1.
        rng: the only source of chance.

    Returns:
        bool (len(ids),), true = masked.
    """
    ordinary = np.flatnonzero(~np.isin(np.asarray(ids, dtype=np.int64), list(special_ids)))
    count = min(len(ordinary), max(1, round(ratio * len(ordinary)))) if ratio > 0 else 0
    mask = np.zeros(len(ids), dtype=bool)
    mask[rng.choice(ordinary, size=count, replace=False)] = True
    return mask
