"""``mhmoe-vl score coco``: COCO's average precision of boxes or masks, and a table of the categories."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.records import read_json
from ..errors import DataError, one_line
from . import submission

if TYPE_CHECKING:
    from ..data.coco import CocoSplit
    from ..metrics.coco_ap import CocoScores

IOU_TYPES = ("bbox", "segm")
KINDS = (
    "values missing or of a wrong type",
    "pictures not in the split",
    "categories not in the split",
    "masks of another size than their picture",
)
REMEDY = {
    "bbox": 'write [{"image_id": 1, "category_id": 1, "bbox": [x, y, width, height], "score": 0.5}, ...]',
    "segm": 'write [{"image_id": 1, "category_id": 1, "segmentation": {"size": [], "counts": ""}, "score": 1}, ...]',
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    submission.add_arguments(parser, predictions="COCO's results file: a JSON list of detections, masks as run lengths")
    about = "instances JSON of the whole split; a file without annotations can be checked against only"
    parser.add_argument("--annotations", type=Path, required=True, metavar="A", help=about)
    parser.add_argument("--iou-type", choices=IOU_TYPES, required=True, help="what is compared: boxes or masks")


def run(arguments: argparse.Namespace) -> int:
    """Score the predictions; 2 when ``--check`` found something wrong with them."""
    from ..data.coco import official, read_instances
    from ..metrics.coco_ap import score_coco

    split = read_instances(arguments.annotations, masks=arguments.iou_type == "segm")
    predictions = read_json(arguments.predictions)
    problems = find_problems(predictions, split, arguments.iou_type)
    if not submission.accept(
        arguments, problems, f"{_count(predictions)} detections in {len(split.pictures)} pictures"
    ):
        return 2
    if split.pictures[0].instances is None:
        if arguments.check:
            print(f"{arguments.annotations}: no annotations in it, so nothing to score")
            return 0
        raise DataError(f"{arguments.annotations}: annotations: missing (score against a split with annotations)")
    images = [(picture.id, picture.width, picture.height) for picture in split.pictures]
    truth = [entry for picture in split.pictures for entry in official(picture)]
    scores = score_coco(images, split.categories, truth, predictions, arguments.iou_type)
    print(_table(scores, f"{len(images)} pictures, {len(truth)} objects, {len(predictions)} detections"))
    submission.write_scores(arguments.json, scores.values)
    return 0


def find_problems(predictions: object, split: CocoSplit, iou_type: str) -> list[str]:
    """One line with a count for each kind of mistake."""
    from ..data.coco import result_problems

    kinds = result_problems(predictions, split, iou_type)
    found = []
    for number, (kind, problems) in enumerate(zip(KINDS, kinds, strict=False)):
        if problems:
            first = one_line(": ".join(filter(None, problems[0])), 100)
            remedy = REMEDY[iou_type] if number == 0 else "leave them out, or name the annotations of their split"
            found.append(f"{len(problems)} {kind}, first {first} ({remedy})")
    return found


def _count(predictions: object) -> int:
    return len(predictions) if isinstance(predictions, list) else 0


def _table(scores: CocoScores, counts: str) -> str:
    """The twelve numbers, then AP by category; "-" where there is nothing to find."""
    from ..metrics.coco_ap import EVALUATOR

    lines = [f"{name:<5}  {_shown(value)}" for name, value in scores.values.items()]
    width = max(len(one_line(entry.name, 40)) for entry in scores.classes)
    lines += ["", f"{'category':<{max(width, 8)}}  objects      AP    AP50"]
    for entry in scores.classes:
        name = one_line(entry.name, 40)
        lines.append(f"{name:<{max(width, 8)}}  {entry.objects:7}  {_shown(entry.ap)}  {_shown(entry.ap50)}")
    return "\n".join([*lines, f"{counts}, evaluator: {EVALUATOR}"])


def _shown(value: float) -> str:
    return f"{value:6.4f}" if value >= 0 else f"{'-':>6}"
