"""COCO's average precision: the published scores of known detections, cases by hand, and nothing found."""

from __future__ import annotations

import json

import pytest

from mhmoe_vl.data.coco import official, read_instances
from mhmoe_vl.metrics.coco_ap import NAMES, score_coco

IMAGES = [(1, 100, 100), (2, 100, 100)]
KINDS = {4: "cat", 9: "dog"}


def truth(number: int, image: int, box: list[float], kind: int = 4, crowd: int = 0) -> dict:
    area = box[2] * box[3]
    return {"id": number, "image_id": image, "category_id": kind, "bbox": box, "area": area, "iscrowd": crowd}


def found(image: int, box: list[float], score: float, kind: int = 4) -> dict:
    return {"image_id": image, "category_id": kind, "bbox": box, "score": score}


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_the_published_scores_of_known_detections(data_dir, iou_type):
    folder = data_dir / "coco_ap_known"
    split = read_instances(folder / "instances_val2014_100.json", masks=True)
    results = json.loads((folder / f"instances_val2014_fake{iou_type}100_results.json").read_bytes())
    images = [(picture.id, picture.width, picture.height) for picture in split.pictures]
    annotations = [entry for picture in split.pictures for entry in official(picture)]
    before = json.dumps([annotations, results])
    scores = score_coco(images, split.categories, annotations, results, iou_type)
    expected = json.loads((folder / "expected.json").read_bytes())
    assert list(scores.values) == list(NAMES) == expected["order"]
    assert list(scores.values.values()) == pytest.approx(expected[iou_type], abs=1e-9)
    assert json.dumps([annotations, results]) == before
    present = [entry.ap for entry in scores.classes if entry.objects]
    assert sum(present) / len(present) == pytest.approx(scores.values["AP"], abs=1e-12)
    assert scores.curves["IoU 0.50"][0] > scores.curves["IoU 0.75"][0] > scores.curves["IoU 0.90"][0]
    assert sum(scores.curves["IoU 0.75"]) / 101 == pytest.approx(scores.values["AP75"], abs=1e-12)


def test_by_hand_one_of_two_found_and_one_false_alarm():
    """Best first: a hit of overlap 0.8, then a miss; so precision is 1 up to recall 0.5, at 7 of 10 overlaps."""
    annotations = [truth(1, 1, [10, 10, 40, 40]), truth(2, 2, [10, 10, 40, 40])]
    results = [found(1, [10, 10, 40, 32], 0.9), found(2, [60, 60, 20, 20], 0.5)]
    scores = score_coco(IMAGES, KINDS, annotations, results, "bbox")
    share = 51 / 101  # recalls 0, 0.01, ... 0.50
    assert scores.values["AP50"] == pytest.approx(share)
    assert scores.values["AP"] == pytest.approx(share * 7 / 10)
    assert (scores.values["AR100"], scores.values["APs"]) == (pytest.approx(0.5 * 7 / 10), -1)
    assert [(c.name, c.objects, c.ap50) for c in scores.classes] == [("cat", 2, pytest.approx(share)), ("dog", 0, -1)]
    assert scores.curves["IoU 0.50"] == pytest.approx([1.0] * 51 + [0.0] * 50)


def test_an_object_with_id_0_is_found_like_any_other():
    scores = score_coco(IMAGES, KINDS, [truth(0, 1, [10, 10, 40, 40])], [found(1, [10, 10, 40, 40], 0.9)], "bbox")
    assert scores.values["AP"] == pytest.approx(1.0)


def test_crowds_are_neither_asked_for_nor_counted_as_wrong():
    annotations = [truth(1, 1, [10, 10, 40, 40]), truth(2, 1, [50, 0, 50, 100], crowd=1)]
    annotations = [entry | {"segmentation": {"size": [100, 100], "counts": [10000]}} for entry in annotations]
    results = [found(1, [60, 10, 20, 20], 0.9), found(1, [10, 10, 40, 40], 0.5)]
    scores = score_coco(IMAGES, KINDS, annotations, results, "bbox")
    assert (scores.values["AP"], scores.classes[0].objects) == (pytest.approx(1.0), 1)


def test_pictures_without_detections_count_and_nothing_found_is_zero():
    annotations = [truth(1, 1, [10, 10, 40, 40]), truth(2, 2, [10, 10, 0, 40])]
    half = score_coco(IMAGES, KINDS, annotations, [found(1, [10, 10, 40, 40], 0.9)], "bbox")
    assert half.values["AP"] == pytest.approx(51 / 101)
    for iou_type in ("bbox", "segm"):
        masks = [entry | {"segmentation": {"size": [100, 100], "counts": [100, 9900]}} for entry in annotations]
        none = score_coco(IMAGES, KINDS, masks, [], iou_type)
        assert (none.values["AP"], none.values["AR100"]) == (0, 0)


def test_without_objects_there_is_nothing_to_score():
    scores = score_coco(IMAGES, KINDS, [], [found(1, [1, 1, 9, 9], 0.5)], "bbox")
    assert (scores.values["AP"], scores.curves) == (-1, {})
