"""Large-scale jitter: sizes, boxes and masks that stay on their object, and what is cut away."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mhmoe_vl.data.scale_jitter import ScaleJitter

OPTIONS = {"train": True, "min_scale": 0.1, "max_scale": 2.0, "flip": 0.5}


def picture(height: int = 60, width: int = 90):
    """A black picture with a white box, and a grey one in the other corner."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, 10:30, 20:50], image[:, 50:, 80:] = 255, 100
    boxes = torch.tensor([[20.0, 10, 50, 30], [80, 50, 90, 60]])
    return image, boxes, torch.stack([image[0] == 255, image[0] == 100]).to(torch.uint8)


def test_in_evaluation_the_picture_just_fits():
    jitter = ScaleJitter((128, 64), **OPTIONS | {"train": False})
    image, boxes, masks, kept = jitter(*picture(), np.random.default_rng(0))
    assert image.shape == (3, 43, 64)
    assert masks.shape == (2, 43, 64)
    assert boxes[1, 2:].tolist() == pytest.approx([64, 43], abs=1e-4)
    assert kept.tolist() == [0, 1]


def test_scales_are_uniform_and_pictures_at_most_as_large_as_asked():
    jitter, heights, rng = ScaleJitter((64, 64), **OPTIONS), [], np.random.default_rng(0)
    for _ in range(300):
        image, *_ = jitter(*picture(64, 64), rng)
        heights.append(image.shape[1])
    assert (min(heights) in (6, 7), max(heights)) == (True, 64)
    assert np.mean([height == 64 for height in heights]) == pytest.approx(1 / 1.9, abs=0.08)


def test_boxes_and_masks_stay_on_their_object():
    jitter, seen = ScaleJitter((64, 96), **OPTIONS | {"min_scale": 0.5}), set()
    for seed in range(60):
        image, boxes, masks, kept = jitter(*picture(), np.random.default_rng(seed))
        assert len(boxes) == len(masks) == len(kept)
        seen.add(tuple(kept.tolist()))
        for number, box, mask in zip(kept.tolist(), boxes, masks, strict=True):
            assert image[0][mask.bool()].float().mean() > 0.8 * (255, 100)[number]
            rows, columns = torch.where(mask)
            edges = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (edges - box).abs().max() <= 1.01
    assert seen >= {(0, 1), (0,)}


def test_the_same_generator_gives_the_same_picture():
    jitter = ScaleJitter((64, 64), **OPTIONS)
    first, second = (jitter(*picture(), np.random.default_rng(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_pictures_without_objects_or_masks_pass():
    image, boxes, masks = picture()
    jitter = ScaleJitter((64, 64), **OPTIONS)
    _, boxes, masks, kept = jitter(image, boxes[:0], masks[:0], np.random.default_rng(0))
    assert (len(boxes), len(masks), len(kept)) == (0, 0, 0)
    assert jitter(*picture()[:2], None, np.random.default_rng(0))[2] is None
