from __future__ import annotations

import json

import pack_coco_captions
import pytest

from mhmoe_vl.errors import DataError


def annotations() -> dict:
    return {
        "images": [{"id": 9, "file_name": "9.jpg"}, {"id": 4, "file_name": "4.jpg"}],
        "annotations": [
            {"id": 3, "image_id": 9, "caption": "Second."},
            {"id": 1, "image_id": 9, "caption": " First. "},
            {"id": 2, "image_id": 4, "caption": "Other."},
        ],
    }


def pack(folder, data, *more: str) -> None:
    (folder / "captions.json").write_text(data if isinstance(data, str) else json.dumps(data))
    paths = ["--captions", f"{folder}/captions.json", "--images", f"{folder}/images", "--out", f"{folder}/out"]
    pack_coco_captions.main([*paths, *more])


@pytest.fixture
def folder(tmp_path, picture):
    for name in ("4.jpg", "9.jpg"):
        picture(tmp_path / "images" / name)
    return tmp_path


def test_captions_stand_in_the_order_of_their_ids(folder, load):
    pack(folder, annotations())
    about = [json.loads(s["json"]) for s in load(folder / "out").values()]
    assert sorted(about, key=lambda a: a["image_id"]) == [
        {"image": "4.jpg", "captions": ["Other."], "image_id": 4},
        {"image": "9.jpg", "captions": ["First.", "Second."], "image_id": 9},
    ]


@pytest.mark.parametrize(
    ("section", "entry", "line"),
    [
        (
            "annotations",
            {"id": 7, "image_id": 9, "caption": " "},
            ": annotation with id 7: empty caption (mend",
        ),
        ("annotations", {"id": 7, "image_id": 8, "caption": "x"}, ": annotation with id 7: unknown image_id 8 (mend"),
        ("images", {"id": 5, "file_name": "9.jpg"}, ": image with id 5: no caption (mend the file)"),
    ],
)
def test_bad_captions_stop_or_are_left_out(section, entry, line, folder, load):
    data = annotations()
    data[section].append(entry)
    with pytest.raises(DataError) as error:
        pack(folder, data)
    assert str(error.value).startswith(f"{folder}/captions.json{line}")
    pack(folder, data, "--skip-bad")
    assert len(load(folder / "out")) == 2


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("[1]", ": no list 'images' (name a COCO captions file)"),
        ("{", ":1: not JSON: Expecting property name"),
        ("[" * 100_000, ": JSON nested too deep"),
        ({"images": 5}, ": no list 'images' (name a COCO captions file)"),
        ({"images": [7]}, ":images[0].id: None, not a whole number (mend the file)"),
        ({"images": [{"id": True, "file_name": "9.jpg"}]}, ":images[0].id: True, not a whole number (mend the file)"),
        ({"images": [{"id": 1, "file_name": 2}]}, ":images[0].file_name: 2, not a text (mend the file)"),
        ({"images": [{"id": 1, "file_name": "a"}] * 2}, ":images[1].id: 1 is given twice (mend the file)"),
        ({"annotations": [{"id": 1, "image_id": 4}]}, ":annotations[0].caption: None, not a text (mend the file)"),
    ],
)
def test_broken_files(change, line, folder):
    with pytest.raises(DataError) as error:
        pack(folder, change if isinstance(change, str) else {**annotations(), **change})
    assert str(error.value).startswith(f"{folder}/captions.json{line}")
    assert "\n" not in str(error.value)


def test_real_photos(data_dir, tmp_path, load):
    source = data_dir / "coco_mini"
    file = source / "annotations/captions_train2017.json"
    pack_coco_captions.main(["--captions", str(file), "--images", f"{source}/train2017", "--out", str(tmp_path)])
    about = {a["image_id"]: a for a in (json.loads(s["json"]) for s in load(tmp_path).values())}
    assert len(about) == 80 and sum(len(a["captions"]) for a in about.values()) == 400
    assert "An airport filled with large passenger jets parked next to each other." in about[125870]["captions"]
