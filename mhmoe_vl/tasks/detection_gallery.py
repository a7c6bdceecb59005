"""Pictures with what was found in them beside what is there, for the report of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ..data import rle
from ..data.annotated import read_picture
from ..data.sample import BadSample
from ..data.transforms import decode_image
from .base import Record

SIDE = 320
"""Pixels of the longer side of a drawn picture."""
SHOWN_SCORE = 0.5
"""Score from which a detection is drawn."""
NUM_BARS = 5
COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#f0e442", "#56b4e9", "#e69f00", "#7a5cc0")
"""Of the categories, over and over."""


def cards(records: Sequence[Record], categories: Mapping[int, str]) -> list[dict[str, Any]]:
    """A card per picture: left what was found, right what is there, where that is known."""
    return [_card(record, categories) for record in records]


def _card(record: Record, categories: Mapping[int, str]) -> dict[str, Any]:
    found = [entry for entry in record["detections"] if entry["score"] >= SHOWN_SCORE]
    best = sorted(record["detections"], key=lambda entry: -entry["score"])[:NUM_BARS]
    rows: list[list[Any]] = [[f"left: found, score from {SHOWN_SCORE}", len(found)]]
    sides = [found]
    if record["truth"] is not None:
        rows.append(["right: in the annotations", len(record["truth"])])
        sides.append(record["truth"])
    return {
        "images": _drawings(record, sides, categories),
        "caption": f"picture {record['id']}",
        "right": None,
        "rows": rows,
        "bars": [[categories[entry["category_id"]], entry["score"]] for entry in best],
    }


def _drawings(
    record: Record, sides: Sequence[Sequence[Mapping[str, Any]]], categories: Mapping[int, str]
) -> list[bytes]:
    """The picture as PNG once for each list of objects; none where it cannot be read any more."""
    try:
        image = decode_image(read_picture(record["image"]))
    except (OSError, BadSample):
        return []
    factor = min(1.0, SIDE / max(image.shape[1:]))
    image = functional.resize(image, [max(1, round(side * factor)) for side in image.shape[1:]])
    return [_encoded(_drawn(image, record, entries, categories)) for entries in sides]


def _encoded(image: Tensor) -> bytes:
    file = io.BytesIO()
    functional.to_pil_image(image).save(file, "PNG")
    return file.getvalue()


def _drawn(
    image: Tensor, record: Record, entries: Sequence[Mapping[str, Any]], categories: Mapping[int, str]
) -> Tensor:
    if not entries:
        return image
    numbers = {number: place for place, number in enumerate(categories)}
    colors = [COLORS[numbers[entry["category_id"]] % len(COLORS)] for entry in entries]
    if all("segmentation" in entry for entry in entries):
        masks = torch.stack([_mask(entry["segmentation"], record, image.shape[1:]) for entry in entries])
        image = draw_segmentation_masks(image, masks, alpha=0.45, colors=colors)
    boxes = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]
    boxes *= torch.tensor([image.shape[2] / record["width"], image.shape[1] / record["height"]]).repeat(2)
    names = [categories[entry["category_id"]][:16] for entry in entries]
    return draw_bounding_boxes(image, boxes, labels=names, colors=colors, width=2)


def _mask(segmentation: Any, record: Record, size: Sequence[int]) -> Tensor:
    mask = torch.from_numpy(rle.decode(segmentation, record["height"], record["width"]))
    return functional.resize_mask(mask[None], list(size))[0].bool()
