"""Masks: exact counts, and the statistics of the published procedure."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_vl.data import masking
from mhmoe_vl.data.masking import block_mask, text_mask
from mhmoe_vl.errors import ConfigError


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 1), st.integers(1, 40), st.integers(0, 10**6))
def test_block_mask_masks_exactly(height: int, width: int, ratio: float, min_block: int, seed: int) -> None:
    count = round(ratio * height * width)
    mask = block_mask(height, width, count, min_block, np.random.default_rng(seed))
    assert mask.shape == (height, width) and mask.dtype == bool
    assert mask.sum() == count
    assert np.array_equal(mask, block_mask(height, width, count, min_block, np.random.default_rng(seed)))


def reference_mask(rng: np.random.Generator) -> np.ndarray:
    """The published procedure for 75 of 14 x 14 with blocks of at least 16, patch by patch."""
    mask = np.zeros((14, 14), dtype=int)
    while mask.sum() < 75:
        grown = False
        for _ in range(10):
            budget = 75 - mask.sum()
            area = 16 + rng.random() * (budget - 16)
            aspect = 0.3 ** (1 - 2 * rng.random())
            h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if h < 14 and w < 14:
                top, left = rng.integers(0, 14 - h, endpoint=True), rng.integers(0, 14 - w, endpoint=True)
                new = [(y, x) for y in range(top, top + h) for x in range(left, left + w) if not mask[y, x]]
                if 0 < len(new) <= budget:
                    for place in new:
                        mask[place] = 1
                    grown = True
                    break
        if not grown:
            break
    free = rng.permutation(np.flatnonzero(mask == 0))[: 75 - mask.sum()]
    mask.flat[free] = 1
    return mask


def edges(masks: np.ndarray) -> float:
    """Mean number of neighbouring patches of which one is masked: small for blocks, large for scattered patches."""
    return float(np.mean(np.abs(np.diff(masks, axis=1)).sum((1, 2)) + np.abs(np.diff(masks, axis=2)).sum((1, 2))))


def test_block_mask_has_the_published_statistics() -> None:
    rng, reference_rng = np.random.default_rng(0), np.random.default_rng(1)
    masks = np.stack([block_mask(14, 14, 75, 16, rng) for _ in range(2000)]).astype(int)
    expected = np.stack([reference_mask(reference_rng) for _ in range(2000)])
    ours, theirs = masks.mean(0), expected.mean(0)
    # The standard deviation of a difference of two means of 2000 coins is at most 0.0158.
    assert np.abs(ours - theirs).max() < 4.5 * 0.0158
    assert np.abs(ours - theirs).mean() < 0.0158
    assert abs(ours.mean() - 75 / 196) < 1e-12
    assert abs(edges(masks) / edges(expected) - 1) < 0.02
    scattered = np.stack([rng.permutation(196).reshape(14, 14) < 75 for _ in range(300)]).astype(int)
    assert edges(masks) < 0.5 * edges(scattered)
    # Blocks reach the middle more often than the corners, and treat mirrored places alike.
    assert ours[5:9, 5:9].mean() > 2 * ours[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    assert max(np.abs(ours - ours[::-1]).max(), np.abs(ours - ours[:, ::-1]).max()) < 5 * 0.0158


def test_blocks_have_the_published_areas_and_aspects() -> None:
    rng = np.random.default_rng(0)
    empty = np.zeros((40, 40), dtype=bool)
    blocks = list(filter(None, (masking._try_block(empty, 75, 16, rng) for _ in range(5000))))
    assert len(blocks) > 4800  # rounding takes the others over the budget
    heights = np.array([block[0].stop - block[0].start for block in blocks])
    widths = np.array([block[1].stop - block[1].start for block in blocks])
    areas = heights * widths
    assert 12 <= areas.min() < 18 and 72 < areas.max() <= 75
    assert abs(areas.mean() - (16 + 75) / 2) < 2
    assert abs(np.log(heights / widths).mean()) < 0.03
    assert np.abs(np.log(heights / widths)).max() < math.log(1 / 0.3) + 0.35


@pytest.mark.parametrize(("count", "min_block"), [(-1, 4), (197, 4), (75, 0)])
def test_impossible_block_masks(count: int, min_block: int) -> None:
    with pytest.raises(ConfigError):
        block_mask(14, 14, count, min_block, np.random.default_rng(0))


@given(st.integers(0, 60), st.floats(0, 1), st.integers(0, 10), st.integers(0, 10**6))
def test_text_mask_counts_ordinary_tokens_only(length: int, ratio: float, padding: int, seed: int) -> None:
    ids = [0, *range(10, 10 + length), 2] + [1] * padding
    mask = text_mask(ids, {0, 1, 2}, ratio, np.random.default_rng(seed))
    assert mask.dtype == bool and len(mask) == len(ids)
    expected = max(1, round(ratio * length)) if length and ratio else 0
    assert mask.sum() == expected
    assert not mask[0] and not mask[1 + length :].any()


def test_text_mask_is_even() -> None:
    rng = np.random.default_rng(0)
    mean = np.mean([text_mask([0, *range(5, 25), 2], {0, 2}, 0.15, rng) for _ in range(4000)], axis=0)
    assert mean[0] == mean[-1] == 0
    assert np.abs(mean[1:-1] - 0.15).max() < 0.03
