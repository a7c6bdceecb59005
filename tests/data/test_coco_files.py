"""COCO's instances files: what is read, what is clipped and counted, and what is said of files that are none."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask

from mhmoe_vl.data import rle
from mhmoe_vl.data.coco import official, read_instances, trainable
from mhmoe_vl.errors import DataError

SQUARE = [[2.0, 2.0, 10.0, 2.0, 10.0, 10.0, 2.0, 10.0]]
CROWD = {"size": [20, 30], "counts": [100, 50, 450]}


def entry(number: int, image: int = 7, **fields: Any) -> dict[str, Any]:
    values = {"id": number, "image_id": image, "category_id": 90, "bbox": [2, 2, 8, 8], "area": 64, "iscrowd": 0}
    return {**values, "segmentation": SQUARE, **fields}


def coco(**lists: Any) -> dict[str, Any]:
    """Two pictures, the second without objects; sparse category ids; a crowd."""
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 30, "height": 20} for i in (900, 7)]
    kinds = [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}]
    crowd = entry(12, iscrowd=1, segmentation=CROWD, category_id=3)
    return {"info": {}, "images": images, "annotations": [entry(10), crowd], "categories": kinds, **lists}


def read(tmp_path: Path, value: Any, *, masks: bool = True):
    path = tmp_path / "a.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return read_instances(path, masks=masks)


def test_ids_may_be_sparse_and_pictures_without_objects(tmp_path):
    split = read(tmp_path, coco())
    assert split.categories == {3: "car", 90: "toothbrush"}
    assert [(p.id, len(p.instances)) for p in split.pictures] == [(7, 2), (900, 0)]
    first, crowd = split.pictures[0].instances
    assert first.segmentation[0].tolist() == SQUARE[0]
    assert (crowd.crowd, crowd.segmentation) == (True, CROWD)


def test_the_official_form_is_what_the_file_says(tmp_path):
    entries = coco()["annotations"]
    assert official(read(tmp_path, coco()).pictures[0]) == entries
    without = [{k: v for k, v in e.items() if k != "segmentation"} for e in entries]
    assert official(read(tmp_path, coco(), masks=False).pictures[0]) == without


def test_a_list_of_pictures_alone_is_a_split_without_truth(tmp_path):
    value = coco()
    del value["annotations"]
    assert [picture.instances for picture in read(tmp_path, value).pictures] == [None, None]


def test_real_files_are_read_whole(data_dir):
    for split, pictures, objects, crowds in (("train", 80, 739, 8), ("val", 79, 624, 5)):
        found = read_instances(data_dir / f"coco_mini/annotations/instances_{split}2017.json", masks=True)
        instances = [instance for picture in found.pictures for instance in picture.instances]
        counts = (len(found.pictures), len(instances), sum(instance.crowd for instance in instances))
        assert (*counts, len(found.categories)) == (pictures, objects, crowds, 80)


def test_odd_boxes_are_clipped_or_left_out_and_counted(tmp_path):
    boxes = {
        "inside": [1, 2, 3, 4], "clipped": [-5, 10, 10, 30], "no height (train2014 has one)": [1, 2, 3, 0],
        "outside": [31, 2, 3, 4], "a hundredth too far": [20, 10, 10.004, 10],
    }  # fmt: skip
    entries = [entry(i, bbox=box) for i, box in enumerate(boxes.values())] + [entry(9, iscrowd=1)]
    [picture, _] = read(tmp_path, coco(annotations=entries)).pictures
    kept, counts = trainable(picture)
    assert [instance.box for instance in kept] == [(1, 2, 3, 4), (0, 10, 5, 10), (20, 10, 10, 10)]
    assert counts == Counter(clipped=1, empty=2, crowds=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"bbox": [1, 2, 3]},
            "annotations[0].bbox: need x, y, width, height in pixels, the last two from 0 up, got a list",
        ),
        ({"bbox": [1, 2, -3, 4]}, "annotations[0].bbox: need x, y"),
        ({"bbox": [1, 2, 3, 1e200]}, "annotations[0].bbox: need x, y"),
        ({"bbox": [1, 2, 3, None]}, "annotations[0].bbox: need x, y"),
        ({"bbox": [1e5, 2, 3, 4]}, "annotations[0].bbox: [100000, 2, 3, 4] lies far outside of the picture of 30 x 20"),
        ({"bbox": [-40, 2, 3, 4]}, "annotations[0].bbox: [-40, 2, 3, 4] lies far outside"),
        ({"segmentation": [[1, 2, 3, 4, 5]]}, "annotations[0].segmentation: need polygons of 3 points or more"),
        ({"segmentation": [[1, 2, 3, 4]]}, "annotations[0].segmentation: need polygons"),
        ({"segmentation": []}, "annotations[0].segmentation: need polygons"),
        ({"segmentation": [[1, 2, 3, 4, 5, "6"]]}, "annotations[0].segmentation[0]: need numbers only"),
        (
            {"segmentation": [SQUARE[0], [1, 2, 3, 1e9, 5, 6]]},
            "annotations[0].segmentation[1]: a point far outside of the picture of 30 x 20",
        ),
        ({"segmentation": {"size": [20, 30]}}, "annotations[0].segmentation: counts: need run lengths or their text"),
        (
            {"segmentation": {"size": [20, 30], "counts": [600, 1]}},
            "annotations[0].segmentation: counts: runs of 601 pixels for a mask of 20 x 30",
        ),
        (
            {"segmentation": {"size": [30, 20], "counts": [600]}},
            "annotations[0].segmentation.size: [30, 20] for the picture of 30 x 20",
        ),
        ({"segmentation": {"size": [20, 30], "counts": "\x7f~"}}, "annotations[0].segmentation: counts: not a text of"),
        ({"segmentation": {"size": [20, 30], "counts": [-1, 601]}}, "annotations[0].segmentation: counts: need run"),
        ({"category_id": 91}, "annotations[0].category_id: 91 is not in categories"),
        ({"image_id": 8}, "annotations[0].image_id: 8 is not in images"),
        ({"id": 12}, "annotations[1].id: 12 stands already at [0]"),
        ({"iscrowd": 2}, "annotations[0].iscrowd: need 0 or 1, got 2"),
        ({"iscrowd": None}, "annotations[0].iscrowd: need 0 or 1, got null"),
        ({"area": -1}, "annotations[0].area: need a number from 0 up, got -1"),
    ],
)
def test_bad_annotations_are_named_with_their_place(tmp_path, fields, message):
    value = coco()
    value["annotations"][0] |= fields
    with pytest.raises(DataError) as caught:
        read(tmp_path, value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def change(place: str, **fields: Any) -> dict[str, Any]:
    value = coco()
    value[place] = [copy.deepcopy(value[place][0]) | fields, *value[place][1:]]
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"images": [NaN]}', "line 1, byte 12: NaN is no finite number"),
        (change("images", id=7), "images[1].id: 7 stands already at [0]"),
        (
            change("images", file_name="000000000007.jpg"),
            "images[1]: has the picture of images[0], 000000000007.jpg",
        ),
        (change("images", width=0), "images[0].width: need a whole number from 1 to 16384, got 0"),
        (change("images", width=16384, height=16384), "images[0]: picture of 268435456 pixels (at most 25000000)"),
        (change("images", file_name="../../etc/passwd"), "images[0].file_name: need a file name below the folder"),
        (change("images", file_name="/etc/passwd"), "images[0].file_name: need a file name below the folder"),
        (change("images", file_name="a\x1b.jpg"), "images[0].file_name: need a file name below the folder"),
        (change("categories", id=3), "categories[1].id: 3 stands already at [0]"),
        (change("categories", name=""), "categories[0].name: need a text that is not empty"),
        (coco(categories=[]), "categories: need at least 1, got none"),
        (coco(images=[], annotations=[]), "images: need at least 1, got none"),
        ({"annotations": []}, "images: missing; categories: missing"),
        (coco(annotations=None), "annotations: need a list, got null"),
    ],
)
def test_bad_lists_are_named_with_their_place(tmp_path, value, message):
    with pytest.raises(DataError) as caught:
        read(tmp_path, value)
    assert message in str(caught.value)


# ---------------------------------------------------------------------------------------------- masks
def test_run_lengths_are_read_as_pycocotools_writes_them():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        for size in ((1, 1), (7, 300), (400, 300)):
            pixels = (rng.random(size) < share).astype(np.uint8)
            text = rle.encode(pixels)
            column = pixels.ravel(order="F")
            changes = np.flatnonzero(np.diff(np.concatenate([[0], column]))).tolist()
            runs = np.diff([0, *changes, column.size])
            assert rle.decode_counts(text["counts"]).tolist() == runs.tolist()
            assert rle.rle_problem(text) == ""
            assert np.array_equal(rle.decode(text, *size), pixels)
            assert np.array_equal(rle.decode({"size": list(size), "counts": runs.tolist()}, *size), pixels)


def test_texts_that_are_no_run_lengths_are_refused():
    good = rle.encode(np.eye(40, dtype=np.uint8))
    assert rle.rle_problem(good) == ""
    for text in ("", good["counts"][:-1], good["counts"] + "0", "\x00", "é", "o" * 40, "0" * 40):
        assert rle.rle_problem(good | {"counts": text}), text
    for size in ([40], [40, 0], [40, 2**21], ["40", 40], None, [40.0, 40]):
        assert rle.rle_problem(good | {"size": size}), size


def test_runs_whose_sum_wraps_around_are_refused():
    """Their differences are small enough to be written, and their sum is 16 modulo 2^64."""
    number, total = 70_000, 2**64 + 16
    difference = total // sum(i // 2 for i in range(number))
    runs = [0] + [(i // 2) * difference for i in range(1, number)]
    runs[-1] += total - sum(runs)
    differences = [run if i < 3 else run - runs[i - 2] for i, run in enumerate(runs)]
    groups = [[(value >> 5 * k) & 31 for k in range(7)] for value in differences]
    text = "".join(chr(48 + group + (32 if k < 6 else 0)) for value in groups for k, group in enumerate(value))
    assert rle.rle_problem({"size": [4, 4], "counts": text}).startswith("counts: ")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
def test_polygons_become_the_mask_that_pycocotools_makes_of_them(data_dir):
    path = data_dir / "coco_mini/annotations/instances_val2017.json"
    for picture in read_instances(path, masks=True).pictures[:5]:
        size = (picture.height, picture.width)
        for instance, given in zip(picture.instances, official(picture), strict=True):
            runs = mask.frPyObjects(given["segmentation"], *size)
            wanted = mask.decode(runs if instance.crowd else mask.merge(runs))
            assert np.array_equal(rle.decode(instance.segmentation, *size), wanted)
