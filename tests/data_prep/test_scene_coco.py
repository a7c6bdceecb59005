from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import scenes
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scene_coco import CATEGORY_IDS, Instances, instances_files
from scene_drawing import Scene, SceneObject, draw

from mhmoe_vl.data.annotated import PictureFolders, require_pictures
from mhmoe_vl.data.captions import read_captions, read_references

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
NOTHING = [word for name in scenes.STREAMS for word in (f"--{name}", "0")]
SQUARE = SceneObject("square", "red", "large", (64.0, 64.0), 20.0, 0.0)
RING = SceneObject("ring", "blue", "small", (100.0, 30.0), 10.0, 0.0)
CROWD = tuple(SceneObject("diamond", "red", "small", (x, 100.0), 5.0, 0.0) for x in (20.0, 40.0))


def annotations_of(item: Instances) -> list[dict]:
    return json.loads(instances_files({"train": [item]})["annotations/instances_train2017.json"])["annotations"]


def test_annotations_by_hand():
    scene = Scene(128, "white", "plain", (*CROWD, SQUARE, RING))
    square, ring, crowd = annotations_of(Instances(scene, CROWD))
    assert [a["id"] for a in (square, ring, crowd)] == [1, 2, 3]
    assert [a["iscrowd"] for a in (square, ring, crowd)] == [0, 0, 1]
    assert square["category_id"] == CATEGORY_IDS["square"]
    assert square["segmentation"] == [[49.86, 49.86, 78.14, 49.86, 78.14, 78.14, 49.86, 78.14]]
    assert square["bbox"] == [49.86, 49.86, 28.28, 28.28]
    assert square["area"] == pytest.approx(28.28**2, abs=0.01)
    assert len(ring["segmentation"]) == 2
    assert ring["area"] == pytest.approx(np.pi * (10**2 - 5.5**2), rel=0.01)
    assert crowd["segmentation"]["size"] == [128, 128]
    assert sum(crowd["segmentation"]["counts"]) == 128 * 128
    assert sum(crowd["segmentation"]["counts"][1::2]) == crowd["area"]
    left, top, width, height = crowd["bbox"]
    assert abs(left - 16.7) < 1 and abs(left + width - 43.3) < 1 and abs(top - 95) < 1 and abs(top + height - 105) < 1


def test_a_scene_without_objects_has_no_annotation():
    assert annotations_of(Instances(Scene(64, "white", "plain", ()))) == []


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    out = tmp_path_factory.mktemp("coco")
    scenes.main([*NOTHING, "--out", str(out), "--coco", "150", "--captions", "20", "--size", "64"])
    return out


def load(out, split):
    return COCO(out / f"coco/annotations/instances_{split}2017.json")


def test_the_truth_scores_one(coco):
    truth = load(coco, "train")
    instances = [a for a in truth.anns.values() if not a["iscrowd"]]
    found = [{**a, "score": 1.0, "segmentation": truth.annToRLE(a)} for a in instances]
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(truth, truth.loadRes([dict(a) for a in found]), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == 1


def test_empty_pictures_crowds_and_sparse_categories(coco):
    truth = load(coco, "train")
    empty = [i for i in truth.imgs if not truth.getAnnIds([i])]
    crowds = [a for a in truth.anns.values() if a["iscrowd"]]
    assert 1 <= len(empty) <= 15 and 1 <= len(crowds) <= 15
    assert {c["id"] for c in truth.dataset["categories"]} == set(CATEGORY_IDS.values()) != set(range(1, 9))
    assert {a["category_id"] for a in truth.anns.values()} == set(CATEGORY_IDS.values())


def test_masks_are_where_something_is_drawn(coco):
    """Pixels that a shape covers wholly are in the mask, those that none touches are not; the rim is rounded."""
    truth = load(coco, "train")
    items = scenes.make_examples("coco", 150, 0, seed=0, image_size=64)["train"]
    for image, item in zip(truth.imgs.values(), items, strict=True):
        black = tuple(replace(o, color="black") for o in item.scene.objects)
        picture = np.array(draw(replace(item.scene, background="white", texture="plain", objects=black)).convert("L"))
        masked = np.zeros(picture.shape, bool)
        for annotation in truth.imgToAnns[image["id"]]:
            masked |= truth.annToMask(annotation).astype(bool)
        assert not (masked & (picture == picture.max())).any(), image["file_name"]
        assert not (~masked & (picture < 40)).any(), image["file_name"]


def test_splits_have_no_picture_in_common(coco):
    train, val = (load(coco, split).imgs for split in ("train", "val"))
    assert len(val) == 15 and not set(train) & set(val)


def test_the_reader_takes_the_captions(coco):
    for split, count in (("train", 20), ("val", 2)):
        path = coco / f"captions/annotations/captions_{split}2014.json"
        examples = read_captions(path, PictureFolders([coco / f"captions/{split}2014"]))
        require_pictures(examples)
        items = scenes.make_examples("captions", 20, 2, seed=0, image_size=64)[split]
        assert [e.record.captions for e in examples] == [item.captions for item in items]
        assert all(len(captions) == 5 for captions in read_references(path).values()) and len(items) == count


@pytest.mark.parametrize("kind", ["instances", "captions"])
def test_keys_are_the_official_ones(kind, coco, data_dir):
    theirs = json.loads((data_dir / f"coco_mini/annotations/{kind}_val2017.json").read_text())
    folder, year = ("coco", 2017) if kind == "instances" else ("captions", 2014)
    ours = json.loads((coco / folder / f"annotations/{kind}_val{year}.json").read_text())
    assert set(ours) == set(theirs)
    for name in set(theirs) - {"info"}:
        assert set(ours[name][0]) == set(theirs[name][0])
    assert set(ours["info"]) == set(theirs["info"])
