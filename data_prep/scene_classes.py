"""Scenes of one shape each, in folders by class, as ImageFolder reads them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scene_drawing import SHAPES, Scene, pick, sample_scene
from scene_files import Files

ClassRow = tuple[Scene, ...]
"""One scene of every class, in the order of ``SHAPES``."""


def make_row(rng: np.random.Generator, image_size: int) -> ClassRow:
    """A picture of every class, each with one shape, wherever it was among others."""
    return tuple(_single(sample_scene(rng, image_size), shape, rng) for shape in SHAPES)


def _single(scene: Scene, shape: str, rng: np.random.Generator) -> Scene:
    return replace(scene, objects=(replace(pick(rng, scene.objects), shape=shape),))


def class_files(splits: dict[str, list[ClassRow]]) -> Files:
    """``<split>/<class>/<number>.jpg``."""
    return {
        f"{split}/{scene.objects[0].shape}/{i:06d}.jpg": scene
        for split, rows in splits.items()
        for i, row in enumerate(rows)
        for scene in row
    }
