from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image, ImageFilter
from pycocotools import mask as coco_mask
from scene_drawing import BACKGROUNDS, COLORS, RADII, SHAPES, TEXTURES, Scene, SceneObject, draw, sample_scene

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' decode
SCENES = [sample_scene(np.random.default_rng([1, i])) for i in range(60)]


def mask_of(record: dict, size: int) -> np.ndarray:
    """The mask as COCO's own code rasterises the recorded polygons."""
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(record["segmentation"], size, size))).astype(bool)


def grown(mask: np.ndarray, by: type, window: int = 3) -> np.ndarray:
    return np.array(Image.fromarray(mask.astype(np.uint8)).filter(by(window))).astype(bool)


def test_everything_that_can_occur_does():
    objects = [o for scene in (sample_scene(np.random.default_rng([2, i])) for i in range(300)) for o in scene.objects]
    assert {o.shape for o in objects} == set(SHAPES) and {o.color for o in objects} == set(COLORS)
    assert {o.size for o in objects} == set(RADII)
    assert {s.background for s in SCENES} == set(BACKGROUNDS) and {s.texture for s in SCENES} == set(TEXTURES)
    assert {len(s.objects) for s in SCENES} == {1, 2, 3, 4}


def test_the_picture_is_what_the_ground_truth_says():
    for scene in SCENES:
        pixels = np.array(draw(scene)).astype(int)
        anything = np.zeros(pixels.shape[:2], bool)
        for item in scene.record()["objects"]:
            mask = mask_of(item, scene.image_size)
            inside = grown(mask, ImageFilter.MinFilter)
            assert inside.sum() > 10
            assert (pixels[inside] == COLORS[item["color"]]).all()
            anything |= grown(mask, ImageFilter.MaxFilter, 5)  # COCO's masks leave out the thinnest tips
        offset = pixels[~anything] - BACKGROUNDS[scene.background]
        assert offset.max() <= 0 and offset.min() >= -10


def test_boxes_are_tight_around_the_pixels():
    for scene in SCENES:
        pixels = np.array(draw(scene)).astype(int)
        differs = np.abs(pixels - BACKGROUNDS[scene.background]).max(-1) > 24
        for item in scene.record()["objects"]:
            rows, columns = np.nonzero(differs & grown(mask_of(item, scene.image_size), ImageFilter.MaxFilter))
            x, y, w, h = item["box"]
            seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert np.allclose(seen, (x, y, x + w, y + h), atol=1.5), (item, seen)
            assert x >= 0 and y >= 0 and x + w <= scene.image_size and y + h <= scene.image_size


def test_objects_neither_touch_nor_look_alike_and_go_from_left_to_right():
    for scene in SCENES:
        masks = sum(mask_of(item, scene.image_size).astype(int) for item in scene.record()["objects"])
        assert masks.max() == 1
        assert len({(o.shape, o.color) for o in scene.objects}) == len(scene.objects)
        assert [o.center[0] for o in scene.objects] == sorted(o.center[0] for o in scene.objects)


def test_a_ring_has_a_hole_and_a_diamond_none():
    ring, diamond = (SceneObject(shape, "red", "large", (40.0, 40.0), 30.0, 0.0) for shape in ("ring", "diamond"))
    pixels = np.array(draw(Scene(80, "white", "plain", (ring,))))
    assert tuple(pixels[40, 40]) == BACKGROUNDS["white"] and tuple(pixels[40, 64]) == COLORS["red"]
    area = coco_mask.area(coco_mask.merge(coco_mask.frPyObjects(ring.record()["segmentation"], 80, 80)))
    assert area == pytest.approx(math.pi * 30**2 * (1 - 0.55**2), rel=0.03)
    assert tuple(np.array(draw(Scene(80, "white", "plain", (diamond,))))[40, 40]) == COLORS["red"]
    assert diamond.box() == (20.2, 10.0, 39.6, 60.0)


def test_relations_by_hand():
    def at(x: float, y: float, color: str) -> SceneObject:
        return SceneObject("circle", color, "small", (x, y), 5.0, 0.0)

    scene = Scene(128, "grey", "plain", (at(20, 20, "red"), at(50, 40, "blue"), at(60, 110, "green")))
    # red -> blue is 30 right, 20 down: 1.5 times, just clear; red -> green is 40 right, 90 down.
    assert set(scene.relations()) == {
        (0, "left of", 1),
        (1, "right of", 0),
        (0, "above", 2),
        (2, "below", 0),
        (1, "above", 2),
        (2, "below", 1),
    }
    diagonal = Scene(128, "grey", "plain", (at(20, 20, "red"), at(60, 60, "blue")))
    assert diagonal.relations() == []


@pytest.mark.parametrize("size", [32, 200])
def test_other_sizes(size):
    scene = sample_scene(np.random.default_rng(3), size)
    assert draw(scene).size == (size, size)
    assert all(o.radius == pytest.approx(RADII[o.size] * size, rel=0.12) for o in scene.objects)
