"""Scenes in COCO's files: captions, and instances with masks, where shapes are the categories.

As in COCO, some pictures of the instances set have no object, and in some a crowd of small shapes is one region.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from scene_captions import caption
from scene_drawing import COLORS, SHAPES, Point, Scene, SceneObject, draw_mask, pick, sample_scene, simple_scene
from scene_files import Files, numbered

NUM_CAPTIONS = 5
EMPTY, CROWDED = 0.03, 0.05
"""Shares of the pictures without object and with a crowd, where there is room for one."""
CATEGORY_IDS = dict(zip(SHAPES, (1, 3, 4, 7, 11, 13, 16, 21), strict=True))
"""With gaps, as in COCO."""
CROWD_SIDE, CROWD_PITCH, CROWD_RADIUS = 3, 0.11, 0.045
"""Shapes along a side of a crowd, their distance, and radius, as shares of the picture's side."""


class Captioned(NamedTuple):
    """A scene with its English captions."""

    scene: Scene
    captions: tuple[str, ...]


class Instances(NamedTuple):
    """A scene, and those of its objects that are annotated as one crowd; they may be alike."""

    scene: Scene
    crowd: tuple[SceneObject, ...] = ()


def make_captioned(rng: np.random.Generator, image_size: int) -> Captioned:
    """A scene with captions by lot; the same caption may come twice."""
    scene = simple_scene(rng, image_size)
    return Captioned(scene, tuple(caption(scene, "en", rng) for _ in range(NUM_CAPTIONS)))


def make_instances(rng: np.random.Generator, image_size: int) -> Instances:
    """A scene, seldom without objects or with a crowd."""
    scene, chance = sample_scene(rng, image_size), rng.random()
    if chance < EMPTY:
        return Instances(replace(scene, objects=()))
    center = _free_place(scene, rng) if chance < EMPTY + CROWDED else None
    if center is None:
        return Instances(scene)
    crowd = _crowd(center, image_size, rng)
    objects = sorted((*scene.objects, *crowd), key=lambda o: o.center)
    return Instances(replace(scene, objects=tuple(objects)), crowd)


def _free_place(scene: Scene, rng: np.random.Generator) -> Point | None:
    """The centre of a crowd that touches nothing; none when no place was found."""
    half = (CROWD_SIDE // 2 * CROWD_PITCH + CROWD_RADIUS) * scene.image_size
    for _ in range(30):
        x, y = rng.uniform(half, scene.image_size - half, 2).tolist()
        # A square around the crowd; the distance of a circle from it is at least that along one axis.
        apart = [max(abs(x - o.center[0]), abs(y - o.center[1])) > half + o.radius for o in scene.objects]
        if all(apart):
            return x, y
    return None


def _crowd(center: Point, image_size: int, rng: np.random.Generator) -> tuple[SceneObject, ...]:
    """Small shapes of one kind on a grid, at least half of its places."""
    shape, radius = pick(rng, SHAPES), round(CROWD_RADIUS * image_size, 1)
    steps = (np.arange(CROWD_SIDE) - CROWD_SIDE // 2) * CROWD_PITCH * image_size
    places = list(itertools.product((center[0] + steps).tolist(), (center[1] + steps).tolist()))
    kept = rng.permutation(len(places))[: int(rng.integers(len(places) // 2 + 1, len(places) + 1))]
    return tuple(
        SceneObject(shape, pick(rng, tuple(COLORS)), "small", (round(x, 1), round(y, 1)), radius, 0.0)
        for x, y in (places[k] for k in kept)
    )


# -------------------------------------------------------------------------------------------- files
def captions_files(splits: dict[str, list[Captioned]]) -> Files:
    """Pictures and captions as COCO 2014 names them."""
    files: Files = {}
    for number, (split, items) in enumerate(splits.items()):
        subset = f"{split}2014"
        by_id = numbered(items, number)
        names = {image_id: f"COCO_{subset}_{image_id:012d}.jpg" for image_id in by_id}
        texts = [(image_id, text) for image_id, item in by_id.items() for text in item.captions]
        annotations = [
            {"image_id": image_id, "id": i, "caption": text} for i, (image_id, text) in enumerate(texts, start=1)
        ]
        files |= _files("captions", subset, names, by_id, {"annotations": annotations})
    return files


def instances_files(splits: dict[str, list[Instances]]) -> Files:
    """Pictures and instances as COCO 2017 names them."""
    files: Files = {}
    categories = [{"supercategory": "shape", "id": i, "name": shape} for shape, i in CATEGORY_IDS.items()]
    for number, (split, items) in enumerate(splits.items()):
        by_id = numbered(items, number)
        names = {image_id: f"{image_id:012d}.jpg" for image_id in by_id}
        found = [entry for image_id, item in by_id.items() for entry in _instances(image_id, item)]
        annotations = [{**entry, "id": i} for i, entry in enumerate(found, start=1)]
        files |= _files(
            "instances", f"{split}2017", names, by_id, {"annotations": annotations, "categories": categories}
        )
    return files


def _files(kind: str, subset: str, names: Mapping[int, str], by_id: Mapping[int, Any], more: dict[str, Any]) -> Files:
    """The pictures of a subset and its JSON."""
    info = {
        "description": f"Drawn scenes: {kind}",
        "url": "",
        "version": "1.0",
        "year": 2026,
        "contributor": "data_prep/scenes.py",
        "date_created": "2026/01/01",
    }
    licenses = [{"url": "", "id": 1, "name": "MIT License"}]
    images = [_image(image_id, names[image_id], item.scene) for image_id, item in by_id.items()]
    pictures = {f"{subset}/{names[image_id]}": item.scene for image_id, item in by_id.items()}
    text = json.dumps({"info": info, "licenses": licenses, "images": images, **more})
    return {**pictures, f"annotations/{kind}_{subset}.json": text}


def _image(image_id: int, file_name: str, scene: Scene) -> dict[str, Any]:
    return {
        "license": 1,
        "file_name": file_name,
        "coco_url": "",
        "height": scene.image_size,
        "width": scene.image_size,
        "date_captured": "2026-01-01 00:00:00",
        "flickr_url": "",
        "id": image_id,
    }


def _instances(image_id: int, item: Instances) -> list[dict[str, Any]]:
    """The annotations of a picture, without ids: one for every object outside the crowd, one for the crowd."""
    found = []
    for one in item.scene.objects:
        if one not in item.crowd:
            polygons = one.polygons()
            segmentation = [list(itertools.chain(*polygon)) for polygon in polygons]
            area = round(sum(map(_area, polygons)), 2)
            found.append(_annotation(image_id, one.shape, segmentation, area, one.box(), crowd=False))
    if item.crowd:
        region = draw_mask(item.crowd, item.scene.image_size)
        rle = {"counts": _run_lengths(region), "size": list(region.shape)}
        (top, left), (bottom, right) = (f(np.argwhere(region), axis=0).tolist() for f in (np.min, np.max))
        box = (left, top, right - left + 1, bottom - top + 1)
        found.append(_annotation(image_id, item.crowd[0].shape, rle, int(region.sum()), box, crowd=True))
    return found


def _annotation(
    image_id: int, shape: str, segmentation: Any, area: float, box: tuple[float, ...], *, crowd: bool
) -> dict[str, Any]:
    return {
        "segmentation": segmentation,
        "area": area,
        "iscrowd": int(crowd),
        "image_id": image_id,
        "bbox": list(box),
        "category_id": CATEGORY_IDS[shape],
    }


def _area(polygon: list[Point]) -> float:
    """Of a polygon, by the shoelace formula."""
    pairs = itertools.pairwise([*polygon, polygon[0]])
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairs)) / 2


def _run_lengths(region: np.ndarray) -> list[int]:
    """COCO's plain run lengths: column by column, those of 0 first."""
    pixels = region.ravel(order="F")
    ends = np.flatnonzero(np.diff(pixels)) + 1
    lengths = np.diff([0, *ends.tolist(), len(pixels)]).tolist()
    return [0, *lengths] if pixels[0] else lengths
