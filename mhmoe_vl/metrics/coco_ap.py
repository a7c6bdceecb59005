"""COCO's average precision of boxes and masks, by pycocotools: its twelve numbers, a table of classes, curves."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""pycocotools' twelve numbers, in its order: -1 where there is nothing to find."""
EVALUATOR = f"pycocotools {version('pycocotools')}"
CURVES = {"IoU 0.50": 0, "IoU 0.75": 5, "IoU 0.90": 8}
"""Overlaps that precision is shown at, as pycocotools numbers them."""


class ClassScore(NamedTuple):
    """One category: its objects, crowds not counted, AP and AP50 (-1 without objects)."""

    name: str
    objects: int
    ap: float
    ap50: float


class CocoScores(NamedTuple):
    """What an evaluation found.

    Attributes:
        values: by name, see :data:`NAMES`.
        classes: in the order of the category ids.
        curves: precision at 101 recalls from 0 to 1, mean over the categories with objects, by overlap.
    """

    values: dict[str, float]
    classes: list[ClassScore]
    curves: dict[str, list[float]]


def score_coco(
    images: Iterable[tuple[int, int, int]],
    categories: Mapping[int, str],
    annotations: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    iou_type: str,
) -> CocoScores:
    """Score detections over all of ``images``; compiled code checks nothing, so everything must have been checked.

    Args:
        images: id, width, height of every picture of the split, with objects or without.
        categories: names by id.
        annotations: the truth in COCO's form.
        results: detections in COCO's form, perhaps none.
        iou_type: ``bbox``, or ``segm`` for masks.
    """
    pictures = [{"id": number, "width": width, "height": height} for number, width, height in images]
    kinds = [{"id": number, "name": name} for number, name in categories.items()]
    found = [_result(entry, number, iou_type) for number, entry in enumerate(results, 1)]
    # Numbered anew: pycocotools takes a detection of the object with id 0 for a false one. Copied: it adds fields.
    wanted = [dict(entry) | {"id": number} for number, entry in enumerate(annotations, 1)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth, ours = (_indexed(pictures, kinds, entries) for entries in (wanted, found))
        evaluation = COCOeval(truth, ours, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # (overlaps, recalls, categories) over objects of all sizes, with 100 detections a picture
    precision = evaluation.eval["precision"][..., 0, 2]
    values = dict(zip(NAMES, map(float, evaluation.stats), strict=True))
    return CocoScores(values, _classes(categories, annotations, precision), _curves(precision))


def _result(entry: Mapping[str, Any], number: int, iou_type: str) -> dict[str, Any]:
    """A detection with the fields that pycocotools' ``loadRes`` adds; sizes of masks are counted in their pixels."""
    kept = {"id": number, "image_id": entry["image_id"], "category_id": entry["category_id"], "iscrowd": 0}
    kept["score"] = float(entry["score"])
    if iou_type == "bbox":
        return kept | {"bbox": entry["bbox"], "area": entry["bbox"][2] * entry["bbox"][3]}
    rle = entry["segmentation"]
    if isinstance(rle["counts"], list):
        rle = mask.frPyObjects(rle, *rle["size"])
    return kept | {"segmentation": rle, "area": float(mask.area(rle)), "bbox": mask.toBbox(rle).tolist()}


def _indexed(pictures: list[dict], kinds: list[dict], entries: list[dict]) -> COCO:
    coco = COCO()
    coco.dataset = {"images": pictures, "categories": kinds, "annotations": entries}
    coco.createIndex()
    return coco


def _classes(
    categories: Mapping[int, str], annotations: Sequence[Mapping[str, Any]], precision: np.ndarray
) -> list[ClassScore]:
    objects = dict.fromkeys(categories, 0)
    for entry in annotations:
        objects[entry["category_id"]] += not entry["iscrowd"]
    numbers = sorted(categories)
    return [
        ClassScore(categories[number], objects[number], _mean(precision[..., i]), _mean(precision[0, :, i]))
        for i, number in enumerate(numbers)
    ]


def _mean(values: np.ndarray) -> float:
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def _curves(precision: np.ndarray) -> dict[str, list[float]]:
    present = precision[:, :, (precision > -1).all(axis=(0, 1))]
    return {name: present[i].mean(axis=1).tolist() for name, i in CURVES.items()} if present.size else {}
