"""What shapes look like, in English words: "star", "red shape", "large red star"."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scene_drawing import COLORS, RADII, SHAPES, Scene, SceneObject, pick

Look = dict[str, str]
"""Attributes of an object: some of ``shape``, ``color`` and ``size``."""
VALUES = {"shape": SHAPES, "color": tuple(COLORS), "size": tuple(RADII)}


def look_of(item: SceneObject, names: Sequence[str]) -> Look:
    """These attributes of an object."""
    return {name: getattr(item, name) for name in names}


def any_look(rng: np.random.Generator, names: Sequence[str]) -> Look:
    """These attributes, drawn by lot."""
    return {name: pick(rng, VALUES[name]) for name in names}


def find(scene: Scene, look: Look) -> list[SceneObject]:
    """The objects of a scene that look so."""
    return [item for item in scene.objects if look_of(item, tuple(look)) == look]


def phrase(look: Look, *, plural: bool = False) -> str:
    """ "red star", or "large red shapes"."""
    noun = look.get("shape", "shape")
    if plural:
        noun += "es" if noun.endswith("s") else "s"
    return " ".join(filter(None, [look.get("size"), look.get("color"), noun]))


def with_article(words: str) -> str:
    """ "a red star", "an orange star"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
