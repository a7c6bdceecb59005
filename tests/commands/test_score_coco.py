"""``mhmoe-vl score coco``: published scores, tables, and what is said of files that do not fit; nothing crashes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import EXTREMES, mutate, mutate_text

from mhmoe_vl import commands
from mhmoe_vl.data import rle

Score = Callable[..., tuple[int, str, str]]
SQUARE = [[10.0, 10.0, 50.0, 10.0, 50.0, 50.0, 10.0, 50.0]]
NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
MORE_EXTREMES = [1e9, -1e9, -5, 10**12, [1e9] * 6, [[1e9] * 6], [[-1.0, 2.0]], {"size": [100, 100], "counts": "_"}]


def square_mask() -> dict[str, Any]:
    pixels = np.zeros((100, 100), np.uint8)
    pixels[10:50, 10:50] = 1
    return rle.encode(pixels)


def annotated(number: int, image: int, kind: int = 18) -> dict[str, Any]:
    ids = {"id": number, "image_id": image, "category_id": kind}
    return {**ids, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0, "segmentation": SQUARE}


ANNOTATIONS = {
    "images": [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 100} for i in (1, 5, 9)],
    "annotations": [annotated(1, 1), annotated(2, 5), annotated(3, 5, 44)],
    "categories": [{"id": 18, "name": "dog"}, {"id": 44, "name": "bottle"}, {"id": 70, "name": "toilet"}],
}
RESULTS = [
    {"image_id": 1, "category_id": 18, "bbox": [10, 10, 40, 40], "segmentation": square_mask(), "score": 0.9},
    {"image_id": 9, "category_id": 44, "bbox": [0, 0, 9, 9.5], "segmentation": square_mask(), "score": 0.25},
]


@pytest.fixture
def score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Score:
    """Writes predictions and annotations, runs the command: exit code, stdout, stderr without the folder."""

    def run(predictions: Any, annotations: Any = ANNOTATIONS, *more: str, iou_type: str = "bbox"):
        arguments = ["score", "coco", "--iou-type", iou_type, *more]
        for option, value in (("predictions", predictions), ("annotations", annotations)):
            path = tmp_path / option
            path.write_text(value if isinstance(value, str) else json.dumps(value))
            arguments += [f"--{option}", str(path)]
        capsys.readouterr()
        code = commands.main(arguments)
        out, err = capsys.readouterr()
        return code, out.replace(f"{tmp_path}/", ""), err.replace(f"{tmp_path}/", "")

    return run


def changed(records: list[dict], number: int, **values: Any) -> list[dict]:
    return [record | (values if i == number else {}) for i, record in enumerate(records)]


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_the_published_scores_of_known_detections(data_dir, tmp_path, capsys, iou_type):
    folder, out = data_dir / "coco_ap_known", tmp_path / "out.json"
    files = {
        "--predictions": folder / f"instances_val2014_fake{iou_type}100_results.json",
        "--annotations": folder / "instances_val2014_100.json",
    }
    call = ["score", "coco", *(str(part) for pair in files.items() for part in pair), "--iou-type", iou_type]
    assert commands.main([*call, "--check", "--json", str(out)]) == 0
    expected = json.loads((folder / "expected.json").read_bytes())
    found = json.loads(out.read_text())
    assert list(found) == NAMES == expected["order"]
    assert list(found.values()) == pytest.approx(expected[iou_type], abs=1e-9)
    printed = capsys.readouterr().out
    assert f"AP     {expected[iou_type][0]:.4f}\n" in printed
    assert "evaluator: pycocotools 2" in printed


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_a_table_of_numbers_and_categories(score, tmp_path, iou_type):
    code, out, err = score(RESULTS, ANNOTATIONS, "--json", str(tmp_path / "o.json"), iou_type=iou_type)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"AP     {51 / 101 / 2:6.4f}"
    assert lines[3] == "APs         -"
    assert lines[13:17] == [
        "category  objects      AP    AP50",
        "dog             2  0.5050  0.5050",
        "bottle          1  0.0000  0.0000",
        "toilet          0       -       -",
    ]
    assert lines[17].startswith("3 pictures, 3 objects, 2 detections, evaluator: pycocotools 2")
    found = json.loads((tmp_path / "o.json").read_text())
    assert list(found) == NAMES
    assert (found["AR100"], found["APs"]) == (pytest.approx(0.25), -1)


def test_nothing_found_scores_zero(score):
    code, out, _ = score([], ANNOTATIONS, "--check")
    assert code == 0
    assert out.startswith("predictions: 0 detections in 3 pictures\nAP     0.0000\n")


def test_check_lists_each_kind_of_mistake_on_a_line(score):
    wrong = [*RESULTS, RESULTS[0] | {"image_id": 2}, RESULTS[0] | {"category_id": 19, "image_id": 3}, {"score": "1"}, 5]
    wrong.append(RESULTS[0] | {"segmentation": {"size": [50, 200], "counts": [10000]}})
    code, out, err = score(wrong, ANNOTATIONS, "--check", iou_type="segm")
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("error: predictions: 5 values missing or of a wrong type, first [4].image_id: missing (")
    elsewhere = "(leave them out, or name the annotations of their split)"
    assert lines[1:] == [
        f"error: predictions: 2 pictures not in the split, first [2].image_id: 2 is not in images {elsewhere}",
        "error: predictions: 1 categories not in the split, first [3].category_id: 19 is not in categories "
        + elsewhere,
        "error: predictions: 1 masks of another size than their picture, first [6].segmentation.size: [50, 200] for a "
        f"picture of [100, 100] {elsewhere}",
    ]


@pytest.mark.parametrize(
    ("values", "iou_type", "message"),
    [
        ({"bbox": [1, 2, 3]}, "bbox", "[1].bbox: need x, y, width, height"),
        ({"bbox": [1, 2, -3, 4]}, "bbox", "[1].bbox: need x, y, width, height"),
        ({"bbox": [1, 2, 1e200, 1e200]}, "bbox", "[1].bbox: need x, y, width, height"),
        ({"bbox": None}, "bbox", "[1].bbox: need x, y, width, height"),
        ({"score": "high"}, "bbox", '[1].score: need a number, got "high"'),
        ({"score": 2**70}, "bbox", None),
        ({"image_id": "9"}, "bbox", '[1].image_id: need a whole number, got "9"'),
        ({"segmentation": SQUARE}, "segm", "[1].segmentation: need a run-length mask, got a list of 1"),
        ({"segmentation": {"size": [100, 100], "counts": "`"}}, "segm", "[1].segmentation: counts: not a text of run"),
        (
            {"segmentation": {"size": [100, 100], "counts": [1]}},
            "segm",
            "[1].segmentation: counts: runs of 1 pixels for a mask of 100 x 100",
        ),
    ],
)
def test_bad_predictions_are_named_with_their_place(score, values, iou_type, message):
    code, _, err = score(changed(RESULTS, 1, **values), iou_type=iou_type)
    assert (code, err.count("\n")) == ((0, 0) if message is None else (2, 1))
    assert message is None or (err.startswith("error: predictions: 1 values") and message in err)


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        (json.dumps(ANNOTATIONS)[:-9], "line 1, byte "),
        ({"annotations": []}, "images: missing"),
        (ANNOTATIONS | {"annotations": changed(ANNOTATIONS["annotations"], 1, category_id=3)}, "annotations[1].categ"),
        (
            ANNOTATIONS | {"annotations": changed(ANNOTATIONS["annotations"], 1, segmentation=[[1e9] * 6])},
            "annotations[1].segmentation[0]: a point far outside of the picture of 100 x 100",
        ),
    ],
)
def test_bad_annotations_are_named_with_their_place(score, annotations, message):
    code, out, err = score(RESULTS, annotations, iou_type="segm")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: annotations: {message}")


def test_a_split_without_annotations_is_checked_only(score):
    bare = {name: value for name, value in ANNOTATIONS.items() if name != "annotations"}
    assert score(RESULTS, bare, "--check")[:2] == (
        0,
        "predictions: 2 detections in 3 pictures\nannotations: no annotations in it, so nothing to score\n",
    )
    code, _, err = score(RESULTS, bare)
    assert (code, err.startswith("error: annotations: annotations: missing (")) == (2, True)


# ---------------------------------------------------------------------------------------- mutations
def mutated(seed: int) -> tuple[Any, Any, str]:
    """Predictions, annotations, and what to compare; one of the files has one thing wrong, or more at once."""
    rng = random.Random(seed)
    files = {"predictions": RESULTS, "annotations": ANNOTATIONS}
    victim = rng.choice(list(files))
    if rng.random() < 0.2:
        files[victim] = mutate_text(json.dumps(files[victim]), rng)
    else:
        for _ in range(rng.choice([1, 1, 1, 3])):
            if files[victim]:
                files[victim] = mutate(files[victim], rng)
    return files["predictions"], files["annotations"], rng.choice(["bbox", "segm"])


def expect_a_score_or_one_line(score: Score, seeds: range) -> None:
    """In this very process: were compiled code to crash on one, all tests would end here."""
    scored = 0
    for seed in seeds:
        predictions, annotations, iou_type = mutated(seed)
        code, out, err = score(predictions, annotations, iou_type=iou_type)
        assert (code, err.count("\n")) in [(0, 0), (2, 1)], (seed, err)
        assert err == "" or err.startswith("error: "), seed
        assert all(character.isprintable() or character == "\n" for character in out + err), seed
        if code == 0:
            scored += 1
            given = json.loads(annotations) if isinstance(annotations, str) else annotations
            counts = f"{len(given['images'])} pictures, {len(given['annotations'])} objects, "
            assert counts in out.splitlines()[-1], seed
    assert scored > len(seeds) / 10


@pytest.fixture
def extreme_numbers(monkeypatch):
    """Far coordinates and broken run lengths among what values are replaced by."""
    monkeypatch.setattr("mutations.EXTREMES", [*EXTREMES, *copy.deepcopy(MORE_EXTREMES)])


@pytest.mark.usefixtures("extreme_numbers")
def test_mutated_files_end_in_a_score_or_in_one_line(score):
    expect_a_score_or_one_line(score, range(200))


@pytest.mark.slow
@pytest.mark.usefixtures("extreme_numbers")
def test_two_thousand_mutated_files_end_in_a_score_or_in_one_line(score):
    expect_a_score_or_one_line(score, range(200, 2000))
