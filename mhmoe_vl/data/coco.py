"""COCO's instances JSON as it is downloaded, and files of results, checked before compiled code sees any of it.

Where real files are odd, they are taken as they are: sparse ids, crowds, pictures without objects, boxes without area
or a little outside of their picture. What :func:`read_instances` refuses is what no evaluation could give a meaning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from .annotated import SOME_TEXT, Example, PictureFolders, Pictures
from .records import (
    ANYTHING,
    NUMBER,
    WHOLE,
    BadRecords,
    Check,
    Problem,
    fields,
    items,
    leaf,
    numbers,
    read_json,
    show,
    sound,
)
from .rle import rle_problem

MAX_SIDE, MAX_PIXELS = 16_384, 25_000_000
MAX_COORDINATE = 1e6
"""Of a box; areas of far larger ones are not finite, and pycocotools takes an overlap that is no number for a hit."""
MAX_DISTANCE = 1.0
"""How far outside of its picture a coordinate may lie, in sides of the picture."""

Segmentation = tuple[np.ndarray, ...] | dict[str, Any]
"""Polygons, each a float64 array x, y, x, y, ..., or a run-length mask ``{"size", "counts"}``."""


class Instance(NamedTuple):
    """One object: ``box`` as x, y, width, height in pixels; no ``segmentation`` where the file has none."""

    id: int
    category_id: int
    box: tuple[float, float, float, float]
    area: float
    crowd: bool
    segmentation: Segmentation | None


class Picture(NamedTuple):
    """One picture; no ``instances`` in a split without annotations."""

    id: int
    file_name: str
    width: int
    height: int
    instances: tuple[Instance, ...] | None


class CocoSplit(NamedTuple):
    """An instances file: names by category id, and the pictures, both in the order of their ids."""

    categories: dict[int, str]
    pictures: list[Picture]


# ------------------------------------------------------------------------------------------- checks
def _is_inner_path(value: Any) -> bool:
    """Whether a file name stays below the folder that it is looked up in."""
    if SOME_TEXT(value) or not value.isprintable() or len(value) > 1024:
        return False
    path = PurePosixPath(value)
    return not path.is_absolute() and ".." not in path.parts


def _is_box(value: Any) -> bool:
    return not numbers(4)(value) and min(value[2:]) >= 0 and max(map(abs, value)) <= MAX_COORDINATE


def _is_polygons(value: Any) -> bool:
    return bool(value) and all(isinstance(p, list) and len(p) % 2 == 0 and len(p) >= 6 for p in value)


def _segmentation(value: Any) -> Sequence[Problem]:
    if isinstance(value, dict):
        problem = rle_problem(value)
        return [("", problem)] if problem else ()
    if not isinstance(value, list) or not _is_polygons(value):
        return [("", f"need polygons of 3 points or more, x and y of each, or a run-length mask, got {show(value)}")]
    bad = [number for number, polygon in enumerate(value) if any(NUMBER(x) for x in polygon)]
    return [(f"[{number}]", "need numbers only") for number in bad]


SIDE = leaf(f"a whole number from 1 to {MAX_SIDE}", lambda value: type(value) is int and 0 < value <= MAX_SIDE)
FILE_NAME = leaf("a file name below the folder of pictures", _is_inner_path)
BOX = leaf("x, y, width, height in pixels, the last two from 0 up", _is_box)
AREA = leaf("a number from 0 up", lambda value: not NUMBER(value) and value >= 0)
FLAG = leaf("0 or 1", lambda value: value in (0, 1) and not isinstance(value, float))
IMAGE: Mapping[str, Check] = {"id": WHOLE, "file_name": FILE_NAME, "width": SIDE, "height": SIDE}
CATEGORY: Mapping[str, Check] = {"id": WHOLE, "name": SOME_TEXT}
ANNOTATION: Mapping[str, Check] = {
    "id": WHOLE, "image_id": WHOLE, "category_id": WHOLE, "bbox": BOX, "area": AREA, "iscrowd": FLAG,
}  # fmt: skip
RESULT: Mapping[str, Check] = {"image_id": WHOLE, "category_id": WHOLE, "score": NUMBER}


def is_instances(value: Any) -> bool:
    """Whether the value of a file is meant to be one of instances; captions have no categories."""
    return isinstance(value, dict) and "images" in value and "categories" in value


def find_problems(value: Any, *, masks: bool | None = None) -> list[Problem]:
    """All that is wrong with the value of an instances file.

    Args:
        value: of the file.
        masks: whether every object must have a segmentation, or none is looked at; by default all must when one has.
    """
    if masks is None:
        masks = any(True for _ in sound(value, "annotations", fields({"segmentation": ANYTHING})))
    annotation = fields(ANNOTATION | ({"segmentation": _segmentation} if masks else {}))
    image, category = fields(IMAGE), fields(CATEGORY)
    lists = {"images": items(image, unique="id", least=1), "categories": items(category, unique="id", least=1)}
    problems = list(fields(lists, {"annotations": items(annotation, unique="id")})(value))

    def entries(name: str, wanted: Check) -> Iterator[tuple[str, Any]]:
        return sound(value, name, wanted if problems else ANYTHING)

    images: dict[int, Any] = {}
    first: dict[str, str] = {}
    more: list[Problem] = []
    for place, entry in entries("images", image):
        images[entry["id"]], name = entry, entry["file_name"]
        if first.setdefault(name, place) != place:
            more.append((place, f"has the picture of {first[name]}, {name}"))
        if what := _too_large(entry):
            more.append((place, what))
    kinds = {entry["id"] for _, entry in entries("categories", category)}
    for place, entry in entries("annotations", annotation):
        more += [(f"{place}.{inner}", what) for inner, what in _misfits(entry, images, kinds, masks)]
    return problems + more


def instances_pictures(value: Any, folders: PictureFolders) -> Pictures:
    """The pictures that the images of a file name."""
    return [(place, folders.find(image["file_name"])) for place, image in sound(value, "images", fields(IMAGE))], []


def _too_large(image: Mapping[str, Any]) -> str:
    pixels = image["width"] * image["height"]
    return f"picture of {pixels} pixels (at most {MAX_PIXELS})" if pixels > MAX_PIXELS else ""


def _misfits(
    entry: Mapping[str, Any], images: Mapping[int, Any], categories: Collection[int], masks: bool
) -> list[Problem]:
    """What does not fit an annotation's picture, or the lists of the file."""
    if entry["image_id"] not in images:
        return [("image_id", f"{entry['image_id']} is not in images")]
    if entry["category_id"] not in categories:
        return [("category_id", f"{entry['category_id']} is not in categories")]
    image, (x, y, width, height) = images[entry["image_id"]], entry["bbox"]
    found = []
    if _far((x, x + width), image["width"]) or _far((y, y + height), image["height"]):
        found.append(("bbox", f"{show_numbers(entry['bbox'])} lies far outside of {_shown(image)}"))
    if masks:
        found += _segmentation_misfits(entry["segmentation"], image)
    return found


def _segmentation_misfits(segmentation: Any, image: Mapping[str, Any]) -> list[Problem]:
    if isinstance(segmentation, dict):
        fits = segmentation["size"] == [image["height"], image["width"]]
        return [] if fits else [("segmentation.size", f"{show_numbers(segmentation['size'])} for {_shown(image)}")]
    far = [
        number
        for number, polygon in enumerate(segmentation)
        if _far(polygon[::2], image["width"]) or _far(polygon[1::2], image["height"])
    ]
    return [(f"segmentation[{number}]", f"a point far outside of {_shown(image)}") for number in far]


def _far(places: Sequence[float], side: int) -> bool:
    return min(places) < -MAX_DISTANCE * side or max(places) > (1 + MAX_DISTANCE) * side


def _shown(image: Mapping[str, Any]) -> str:
    return f"the picture of {image['width']} x {image['height']}"


def show_numbers(values: Iterable[float]) -> str:
    """Numbers as a short list."""
    return f"[{', '.join(f'{value:g}' for value in values)}]"


# ------------------------------------------------------------------------------------------ reading
def read_instances(path: Path, *, masks: bool) -> CocoSplit:
    """The pictures and objects of an official file.

    Args:
        path: instances JSON; or a list of pictures without annotations (``image_info_test-dev2017.json``).
        masks: every object must have a segmentation; else none is read.

    Raises:
        DataError: it is not one. All problems are found at once; the message names the first few with their place.
    """
    value = read_json(path)
    if problems := find_problems(value, masks=masks):
        raise BadRecords(path, problems)
    images = {image["id"]: image for image in value["images"]}
    categories = {entry["id"]: entry["name"] for entry in sorted(value["categories"], key=lambda entry: entry["id"])}
    return CocoSplit(categories, _pictures(value, images, masks))


def _pictures(value: Mapping[str, Any], images: Mapping[int, Any], masks: bool) -> list[Picture]:
    by_image: dict[int, list[Instance]] | None = None
    if "annotations" in value:
        by_image = {number: [] for number in images}
        for entry in value["annotations"]:
            by_image[entry["image_id"]].append(_instance(entry, masks))
    return [
        Picture(
            number,
            images[number]["file_name"],
            images[number]["width"],
            images[number]["height"],
            None if by_image is None else tuple(by_image[number]),
        )
        for number in sorted(images)
    ]


def _instance(entry: Mapping[str, Any], masks: bool) -> Instance:
    segmentation = entry["segmentation"] if masks else None
    if isinstance(segmentation, list):
        segmentation = tuple(np.array(polygon, np.float64) for polygon in segmentation)
    box = tuple(float(number) for number in entry["bbox"])
    return Instance(entry["id"], entry["category_id"], box, entry["area"], bool(entry["iscrowd"]), segmentation)


def examples_of(split: CocoSplit, path: Path, folders: PictureFolders) -> list[Example]:
    """The pictures of a split as examples; ``record`` is a :class:`Picture`."""
    return [Example(str(p.id), p, (folders.find(p.file_name),), str(path)) for p in split.pictures]


def trainable(picture: Picture) -> tuple[list[Instance], Counter[str]]:
    """The objects of a picture to learn from, boxes clipped to it, and how many were ``clipped`` or left out:
    ``crowds``, and ``empty`` ones, of which nothing is inside."""
    kept, counts = [], Counter()
    for instance in picture.instances or ():
        x, y, width, height = instance.box
        left, top = max(0.0, x), max(0.0, y)
        box = (left, top, min(picture.width, x + width) - left, min(picture.height, y + height) - top)
        if instance.crowd:
            counts["crowds"] += 1
        elif min(box[2:]) <= 0:
            counts["empty"] += 1
        else:
            if not np.allclose(box, instance.box, rtol=0, atol=0.01):
                counts["clipped"] += 1
            kept.append(instance._replace(box=box))
    return kept, counts


# ------------------------------------------------------------------------------------- official form
def official(picture: Picture) -> list[dict[str, Any]]:
    """A picture's annotations as they stand in the file."""
    return [_official(instance) | {"image_id": picture.id} for instance in picture.instances or ()]


def _official(instance: Instance) -> dict[str, Any]:
    entry = {
        "id": instance.id, "category_id": instance.category_id, "bbox": list(instance.box), "area": instance.area,
        "iscrowd": int(instance.crowd),
    }  # fmt: skip
    if instance.segmentation is None:
        return entry
    is_rle = isinstance(instance.segmentation, dict)
    polygons = instance.segmentation if is_rle else [polygon.tolist() for polygon in instance.segmentation]
    return entry | {"segmentation": polygons}


# ------------------------------------------------------------------------------------------- results
def result_problems(value: Any, split: CocoSplit, iou_type: str) -> list[list[Problem]]:
    """What is wrong with the value of a results file, by kind: types, then pictures and categories that the split does
    not have, then masks of another size than their picture."""
    place: dict[str, Check] = {"segmentation": _result_mask} if iou_type == "segm" else {"bbox": BOX}
    types = list(items(fields(RESULT | place))(value))
    if not isinstance(value, list):
        return [types]
    sizes = {picture.id: [picture.height, picture.width] for picture in split.pictures}
    pictures, categories, masks = [], [], []
    for number, entry in enumerate(value):
        if fields(RESULT)(entry):
            continue
        if entry["image_id"] not in sizes:
            pictures.append((f"[{number}].image_id", f"{entry['image_id']} is not in images"))
        elif iou_type == "segm" and not place["segmentation"](entry.get("segmentation")):
            wanted = sizes[entry["image_id"]]
            if entry["segmentation"]["size"] != wanted:
                what = f"{show_numbers(entry['segmentation']['size'])} for a picture of {show_numbers(wanted)}"
                masks.append((f"[{number}].segmentation.size", what))
        if entry["category_id"] not in split.categories:
            categories.append((f"[{number}].category_id", f"{entry['category_id']} is not in categories"))
    return [types, pictures, categories, masks]


def _result_mask(value: Any) -> Sequence[Problem]:
    if not isinstance(value, dict):
        return [("", f"need a run-length mask, got {show(value)}")]
    problem = rle_problem(value)
    return [("", problem)] if problem else ()
