from __future__ import annotations

import json

import pack_flickr8k
import pytest

from mhmoe_vl.errors import DataError


@pytest.fixture
def folder(tmp_path, picture):
    for name in ("one", "two", "three"):
        picture(tmp_path / f"images/{name}.jpg")
    rows = ["image,caption", 'one.jpg,"A dog, and a ball ."', "one.jpg,Two dogs .", "two.jpg,A cat", "three.jpg,Schnee"]
    (tmp_path / "captions.txt").write_text("\n".join(rows) + "\n")
    return tmp_path


def pack(folder, *more: str) -> None:
    paths = ["--captions", f"{folder}/captions.txt", "--images", f"{folder}/images", "--out", f"{folder}/out"]
    pack_flickr8k.main([*paths, *more])


def test_one_sample_per_picture_with_all_captions(folder, load):
    pack(folder, "--val-fraction", "0")
    samples = {json.loads(s["json"])["image"]: s for s in load(folder / "out").values()}
    assert set(samples) == {"one.jpg", "two.jpg", "three.jpg"}
    one = samples["one.jpg"]
    assert one["txt"] == b"A dog, and a ball ."
    assert json.loads(one["json"]) == {"image": "one.jpg", "captions": ["A dog, and a ball .", "Two dogs ."]}
    assert one["jpg"] == (folder / "images/one.jpg").read_bytes()


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ("two.jpg,", "captions.txt:6: empty caption (write image,caption; quote commas); --skip-bad leaves them out"),
        ("two.jpg,a,b", "captions.txt:6: 3 fields (write image,caption; quote commas); --skip-bad leaves them out"),
        ("gone.jpg,A bird", "images/gone.jpg: missing (mend or remove it); --skip-bad leaves them out"),
        ("bad.jpg,A bird", "images/bad.jpg: not a readable picture: "),
        ("../captions.txt,A bird", "../captions.txt: not a plain path inside "),
    ],
)
def test_bad_rows_stop_or_are_left_out(row, line, folder, load, capsys):
    (folder / "images/bad.jpg").write_bytes(b"not a picture")
    with (folder / "captions.txt").open("a") as file:
        file.write(row + "\n")
    with pytest.raises(DataError) as error:
        pack(folder)
    assert str(error.value).removeprefix(f"{folder}/").startswith(line)
    assert not (folder / "out").exists()
    pack(folder, "--skip-bad", "--val-fraction", "0")
    assert len(load(folder / "out")) == 3
    assert "left out 1 bad parts, the first: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"picture;text\n", "captions.txt:1: the first line is 'picture;text' (it must be 'image,caption')"),
        (b"", "captions.txt:1: the first line is '' (it must be 'image,caption')"),
        (b"image,caption\na.jpg,\xff\n", "captions.txt: not UTF-8 at byte 20 (convert it)"),
        (b"image,caption\n", "out: nothing to pack (check the input and the options)"),
        (None, "captions.txt: No such file or directory (name a readable file)"),
    ],
)
def test_bad_files(data, line, folder):
    (folder / "captions.txt").unlink()
    if data is not None:
        (folder / "captions.txt").write_bytes(data)
    with pytest.raises(DataError) as error:
        pack(folder, "--val-fraction", "0")
    assert str(error.value) == f"{folder}/{line}"


def test_exit_code(folder, run_script):
    code, error = run_script(
        "pack_flickr8k", "--captions", folder / "captions.txt", "--images", folder / "no", "--out", folder / "out"
    )
    assert (code, error) == (2, f"error: {folder}/no: no such folder (name the folder of the pictures)\n")


def test_real_photos(data_dir, tmp_path, load):
    source = data_dir / "flickr8k_1k"
    pack_flickr8k.main(["--captions", f"{source}/captions.txt", "--images", f"{source}/images", "--out", str(tmp_path)])
    train, val = ({json.loads(s["json"])["image"]: s for s in load(tmp_path / n).values()} for n in ("train", "val"))
    assert (len(train), len(val)) == (718, 80) and not set(train) & set(val)
    captions = [c for s in (train | val).values() for c in json.loads(s["json"])["captions"]]
    assert len(captions) == 3990
    known = json.loads((train | val)["1000268201_693b08cb0e.jpg"]["json"])
    assert known["captions"][1] == "A girl going into a wooden building ."
    assert all(s["jpg"] == (source / "images" / name).read_bytes() for name, s in val.items())
