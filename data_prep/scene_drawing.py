"""Scenes of coloured shapes: what is in one, how one is drawn by lot, and how it is drawn as a picture.

A scene knows everything about its picture (boxes, masks, relations), so captions, questions, sentences and detection
annotations are all written from the same :class:`Scene`.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw

T = TypeVar("T")
Point = tuple[float, float]

COLORS = {
    "red": (216, 44, 44),
    "orange": (244, 138, 26),
    "yellow": (246, 208, 40),
    "green": (46, 154, 70),
    "blue": (42, 92, 208),
    "purple": (136, 62, 176),
    "brown": (124, 76, 40),
    "black": (34, 34, 40),
}
BACKGROUNDS = {
    "white": (250, 250, 248),
    "grey": (190, 193, 198),
    "pink": (252, 206, 218),
    "beige": (236, 222, 192),
    "turquoise": (172, 226, 220),
}
TEXTURES = ("plain", "striped", "dotted")
RADII = {"small": 0.10, "large": 0.18}
"""Radius of the circle around a shape, as a share of the picture's side; single shapes differ from it by up to 8 %."""
COUNTS = (1, 2, 3, 4)
FEW = (1, 1, 1, 1, 1, 1, 2, 2, 3, 4)
"""Numbers of shapes in a scene and in a simple scene, alike likely."""
VAL_ONE_IN = 8
"""One in so many contents of simple scenes is kept for validation."""

MARGIN, GAP = 0.03, 0.03
CLEAR = 1.5
"""One offset must be this many times the other one before a relation counts."""
SUPERSAMPLING = 4


def _circle(radius: float, num_points: int = 48) -> list[Point]:
    angles = [2 * math.pi * i / num_points for i in range(num_points)]
    return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _star() -> list[Point]:
    radii = [1.0, 0.45] * 5
    return [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)]


def _ring() -> list[list[Point]]:
    """Two half rings, since COCO's polygons have no holes."""
    outer, inner = _circle(1.0), _circle(0.55)
    halves = (slice(0, 25), slice(24, 49))
    outer, inner = [*outer, outer[0]], [*inner, inner[0]]
    return [[*outer[half], *reversed(inner[half])] for half in halves]


def _heart() -> list[Point]:
    turns = [2 * math.pi * i / 48 for i in range(48)]
    xs = [16 * math.sin(t) ** 3 for t in turns]
    ys = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
    middle = (max(ys) + min(ys)) / 2
    scale = max(math.hypot(x, y - middle) for x, y in zip(xs, ys, strict=True))
    return [(x / scale, (middle - y) / scale) for x, y in zip(xs, ys, strict=True)]


def _cross() -> list[Point]:
    thick, long = 0.32, math.sqrt(1 - 0.32**2)
    quarter = [(thick, -long), (thick, -thick), (long, -thick)]
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return corners


OUTLINES: dict[str, list[list[Point]]] = {
    "circle": [_circle(1.0)],
    "square": [[(x * math.sqrt(0.5), y * math.sqrt(0.5)) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]],
    "triangle": [[(math.sin(2 * math.pi * i / 3), -math.cos(2 * math.pi * i / 3)) for i in range(3)]],
    "star": [_star()],
    "ring": _ring(),
    "heart": [_heart()],
    "cross": [_cross()],
    "diamond": [[(0.0, -1.0), (0.66, 0.0), (0.0, 1.0), (-0.66, 0.0)]],
}
"""Corners of the polygons of every shape inside the unit circle, y downwards."""
SHAPES = tuple(OUTLINES)


@dataclass(frozen=True)
class SceneObject:
    """One shape.

    Attributes:
        shape, color, size: among ``SHAPES``, ``COLORS``, ``RADII``.
        center: of the circle around the shape, in pixels.
        radius: of that circle, in pixels.
        angle: clockwise turn in degrees.
    """

    shape: str
    color: str
    size: str
    center: Point
    radius: float
    angle: float

    def polygons(self) -> list[list[Point]]:
        """The corners of the polygons that make up the shape, in pixels."""
        cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        (cx, cy), r = self.center, self.radius
        return [
            [(round(cx + r * (x * cos - y * sin), 2), round(cy + r * (x * sin + y * cos), 2)) for x, y in polygon]
            for polygon in OUTLINES[self.shape]
        ]

    def box(self) -> tuple[float, float, float, float]:
        """Left, top, width, height of the shape in pixels."""
        xs, ys = zip(*itertools.chain(*self.polygons()), strict=True)
        return min(xs), min(ys), round(max(xs) - min(xs), 2), round(max(ys) - min(ys), 2)

    def record(self) -> dict[str, Any]:
        """The attributes with ``box`` and, in COCO's form, ``segmentation``: JSON values."""
        segmentation = [list(itertools.chain(*polygon)) for polygon in self.polygons()]
        return {**asdict(self), "box": self.box(), "segmentation": segmentation}


@dataclass(frozen=True)
class Scene:
    """A square picture of shapes that do not touch; no two are alike in shape and colour.

    Attributes:
        image_size: side in pixels.
        background, texture: among ``BACKGROUNDS``, ``TEXTURES``.
        objects: from left to right, by centre.
    """

    image_size: int
    background: str
    texture: str
    objects: tuple[SceneObject, ...]

    def relations(self) -> list[tuple[int, str, int]]:
        """(i, relation, j) wherever object i is clearly left of, right of, above or below object j."""
        found = []
        for i, a in enumerate(self.objects):
            for j, b in enumerate(self.objects):
                dx, dy = b.center[0] - a.center[0], b.center[1] - a.center[1]
                if abs(dx) >= CLEAR * abs(dy) and i != j:
                    found.append((i, "left of" if dx > 0 else "right of", j))
                elif abs(dy) >= CLEAR * abs(dx) and i != j:
                    found.append((i, "above" if dy > 0 else "below", j))
        return found

    def content(self) -> tuple:
        """What a description in words could tell apart: the scene without its exact positions."""
        looks = tuple((o.shape, o.color, o.size) for o in self.objects)
        return self.background, looks, tuple(self.relations())

    def is_for_val(self) -> bool:
        """Whether the scene is kept for validation, where simple scenes are drawn.

        The checksum of its content says it: of simple scenes there are few, and nearly all would stand in the training
        set if it had the first choice.
        """
        return one_in(VAL_ONE_IN, repr(self.content()))

    def record(self) -> dict[str, Any]:
        """The ground truth as JSON values."""
        relations = [{"subject": i, "relation": name, "object": j} for i, name, j in self.relations()]
        return {**asdict(self), "objects": [o.record() for o in self.objects], "relations": relations}


def one_in(number: int, text: str) -> bool:
    """Whether a text is among the one in ``number`` that its checksum chooses."""
    return zlib.crc32(text.encode()) % number == 0


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of ``options``, all alike likely."""
    return options[int(rng.integers(len(options)))]


def sample_scene(rng: np.random.Generator, image_size: int = 128, counts: Sequence[int] = COUNTS) -> Scene:
    """Draw a scene by lot: as many shapes as one of ``counts``, all choices uniform, and places by rejection."""
    background, texture = pick(rng, tuple(BACKGROUNDS)), pick(rng, TEXTURES)
    num_objects = pick(rng, counts)
    objects = None
    while objects is None:
        objects = _place(rng, num_objects, image_size)
    return Scene(image_size, background, texture, tuple(sorted(objects, key=lambda o: o.center)))


def simple_scene(rng: np.random.Generator, image_size: int) -> Scene:
    """A scene of mostly one or two shapes, for questions, statements and captions."""
    return sample_scene(rng, image_size, FEW)


def _place(rng: np.random.Generator, num_objects: int, image_size: int) -> list[SceneObject] | None:
    """Objects that do not touch, or none when one did not fit after 20 tries."""
    placed: list[SceneObject] = []
    looks = rng.permutation(len(SHAPES) * len(COLORS))[:num_objects]
    for look in looks.tolist():
        shape, color = SHAPES[look % len(SHAPES)], tuple(COLORS)[look // len(SHAPES)]
        size = pick(rng, tuple(RADII))
        for _ in range(20):
            radius = RADII[size] * rng.uniform(0.92, 1.08)
            x, y = rng.uniform(MARGIN + radius, 1 - MARGIN - radius, 2) * image_size
            center, radius = (round(x, 1), round(y, 1)), round(radius * image_size, 1)
            if all(math.dist(center, o.center) > radius + o.radius + GAP * image_size for o in placed):
                placed.append(SceneObject(shape, color, size, center, radius, round(rng.uniform(-10, 10), 1)))
                break
        else:
            return None
    return placed


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, with smooth edges."""
    side = scene.image_size * SUPERSAMPLING
    image = Image.fromarray(_background(scene)).resize((side, side), Image.Resampling.NEAREST)
    canvas = ImageDraw.Draw(image)
    for o in scene.objects:
        _fill(canvas, o, COLORS[o.color])
    return image.reduce(SUPERSAMPLING)


def draw_mask(objects: Sequence[SceneObject], image_size: int) -> np.ndarray:
    """The pixels that objects cover by half or more, (side, side) bool."""
    side = image_size * SUPERSAMPLING
    image = Image.new("L", (side, side))
    for o in objects:
        _fill(ImageDraw.Draw(image), o, 255)
    return np.array(image.reduce(SUPERSAMPLING)) >= 128


def _fill(canvas: ImageDraw.ImageDraw, item: SceneObject, fill: int | tuple[int, int, int]) -> None:
    for polygon in item.polygons():
        # Pixel centres lie at half-way coordinates, which PIL's polygons count as whole ones.
        canvas.polygon([(x * SUPERSAMPLING - 0.5, y * SUPERSAMPLING - 0.5) for x, y in polygon], fill=fill)


def _background(scene: Scene) -> np.ndarray:
    """The background, (side, side, 3) uint8; the pattern repeats 8 times and is 10 levels deep."""
    wave = 5 * np.cos((np.arange(scene.image_size) + 0.5) * (2 * math.pi * 8 / scene.image_size)) - 5
    pattern = {"plain": 0 * wave, "striped": wave, "dotted": np.minimum(wave, wave[:, None])}[scene.texture]
    shades = np.broadcast_to(pattern, (scene.image_size, scene.image_size))[..., None]
    return np.rint(np.array(BACKGROUNDS[scene.background]) + shades).astype(np.uint8)
