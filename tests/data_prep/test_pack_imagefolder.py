from __future__ import annotations

import json

import pack_imagefolder
import pytest

from mhmoe_vl.errors import DataError


def test_classes_are_the_sorted_folders(tmp_path, picture, load):
    for name in ("dog/1.jpg", "cat/1.jpg", "cat/sub/2.JPEG", ".hidden/3.jpg"):
        picture(tmp_path / "in" / name)
    (tmp_path / "in/cat/notes.txt").write_text("not a picture")
    pack_imagefolder.main(["--images", f"{tmp_path}/in", "--out", f"{tmp_path}/out"])
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["cat", "dog"]
    found = {json.loads(s["json"])["image"]: s for s in load(tmp_path / "out").values()}
    assert {name: s["cls"] for name, s in found.items()} == {
        "cat/1.jpg": b"0",
        "cat/sub/2.JPEG": b"0",
        "dog/1.jpg": b"1",
    }
    assert json.loads(found["dog/1.jpg"]["json"]) == {"class": "dog", "image": "dog/1.jpg"}


def test_bad_pictures_stop_or_are_left_out(tmp_path, picture, load):
    picture(tmp_path / "in/a/1.jpg")
    (tmp_path / "in/b").mkdir()
    (tmp_path / "in/b/2.jpg").write_bytes(b"")
    arguments = ["--images", f"{tmp_path}/in", "--out", f"{tmp_path}/out"]
    with pytest.raises(DataError, match=r"in/b/2.jpg: not a readable picture: .*--skip-bad"):
        pack_imagefolder.main(arguments)
    pack_imagefolder.main([*arguments, "--skip-bad"])
    assert len(load(tmp_path / "out")) == 1
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["a", "b"]


def test_no_pictures(tmp_path):
    (tmp_path / "in/a").mkdir(parents=True)
    with pytest.raises(DataError, match="in: 1 class folders and no pictures in them"):
        pack_imagefolder.main(["--images", f"{tmp_path}/in", "--out", f"{tmp_path}/out"])
    with pytest.raises(DataError, match="gone: no such folder"):
        pack_imagefolder.main(["--images", f"{tmp_path}/gone", "--out", f"{tmp_path}/out"])


def test_real_photos_with_any_number_of_processes(data_dir, tmp_path, load, run_script):
    arguments = ["--images", data_dir / "imagenet_1k_samples", "--val-fraction", "0.1", "--samples-per-shard", "300"]
    for processes in (1, 2):
        code, error = run_script(
            "pack_imagefolder", *arguments, "--out", tmp_path / str(processes), "--processes", processes
        )
        assert code == 0, error
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n / "train").iterdir()} for n in "12")
    assert one == two
    train, val = load(tmp_path / "1/train"), load(tmp_path / "1/val")
    assert (len(train), len(val)) == (900, 100)
    assert sorted(int(s["cls"]) for s in [*train.values(), *val.values()]) == list(range(1000))
    classes = json.loads((tmp_path / "1/classes.json").read_text())
    assert classes[0] == "n01440764"
    assert all(json.loads(s["json"])["class"] == classes[int(s["cls"])] for s in val.values())
    labels = [int(s["cls"]) for s in train.values()]
    assert labels != sorted(labels)
