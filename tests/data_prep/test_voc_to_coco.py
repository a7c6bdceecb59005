"""Pascal VOC's annotations as COCO's: pixels counted from 1, difficult objects, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import voc_to_coco

from mhmoe_vl.data.coco import read_instances
from mhmoe_vl.errors import DataError

OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin>
<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"""


def xml(*objects: str, width: object = 30, height: object = 20, filename: str = "a.jpg") -> str:
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>{filename}</filename>{size}{''.join(objects)}</annotation>"


def thing(name: str = "dog", box: tuple = (1, 1, 10, 20), difficult: int = 0) -> str:
    return OBJECT.format(name=name, box=box, difficult=difficult)


def voc(folder: Path, **splits: dict[str, str]) -> Path:
    """A folder in VOC's layout: annotation texts by name, by split."""
    for place in ("Annotations", "ImageSets/Main"):
        (folder / place).mkdir(parents=True)
    for split, files in splits.items():
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}  1\n" for name in files))
        for name, text in files.items():
            (folder / "Annotations" / f"{name}.xml").write_text(text)
    return folder


def convert(folder: Path, out: Path, *splits: str) -> None:
    voc_to_coco.main(["--voc", str(folder), "--out", str(out), "--splits", *splits])


def test_boxes_kinds_and_difficult_objects(tmp_path, capsys):
    odd = [thing("cat", (25, 5, 40, 30)), thing("cat", (31, 5, 40, 9))]
    files = {"p": xml(thing(), thing("cat", (5, 5, 5, 5), 1), *odd), "q": xml(filename="q.png")}
    convert(voc(tmp_path / "voc", train=files, val={"r": xml(thing("emu"))}), tmp_path / "out", "train", "val")
    split = read_instances(tmp_path / "out/train.json", masks=False)
    assert split.categories == {1: "cat", 2: "dog", 3: "emu"}
    assert [(p.file_name, p.width, p.height) for p in split.pictures] == [("a.jpg", 30, 20), ("q.png", 30, 20)]
    found = [(i.category_id, i.box, i.area, i.crowd) for i in split.pictures[0].instances]
    assert found == [
        (2, (0, 0, 10, 20), 200, False), (1, (4, 4, 1, 1), 1, True), (1, (24, 4, 6, 16), 96, False),
    ]  # fmt: skip
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith("3 objects, 1 boxes clipped, 1 boxes outside of their picture left out")


def test_real_files_become_what_their_readme_counts(data_dir, tmp_path):
    convert(data_dir / "bccd", tmp_path, "train", "val", "test")
    counts = []
    for split in ("train", "val", "test"):
        value = json.loads((tmp_path / f"{split}.json").read_text())
        counts.append((len(value["images"]), len(read_instances(tmp_path / f"{split}.json", masks=False).pictures)))
        assert [entry["name"] for entry in value["categories"]] == ["Platelets", "RBC", "WBC"]
    assert counts == [(205, 205), (87, 87), (72, 72)]


BOMB = '<!DOCTYPE a [<!ENTITY b "bbbbbbbb"><!ENTITY c "&b;&b;&b;&b;">]>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing|not XML|no element"),
        ("<annotation>", "p.xml: line 1: not XML: "),
        (f"{BOMB}{xml()}", "p.xml: line 1: a document type or entity"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "p.xml: line 1: a document type or entity"),
        (xml(thing("&undefined;")), "p.xml: line 1: not XML: undefined entity"),
        ("<html/>", "p.xml: <html>, need <annotation>"),
        ("<annotation/>", "p.xml: filename: missing"),
        (xml(filename="../x.jpg"), "p.xml: filename: '../x.jpg' is no file name"),
        (xml(width="wide"), "p.xml: size/width: need a number, got 'wide'"),
        (xml(width=0), "p.xml: size/width: 0, need 1 to 16384 pixels"),
        (xml(height="1e9"), "p.xml: size/height: need a number, got '1e9'"),
        (xml(height=2.5), "p.xml: size/height: 2.5, need 1 to"),
        (xml(thing(), thing("")), r"p.xml: object\[1\]/name: missing"),
        (xml(thing(box=(9, 1, 3, 4))), r"p.xml: object\[0\]/bndbox: xmin 9, ymin 1, xmax 3, ymax 4"),
        (xml(thing(box=("nan", 1, 3, 4))), r"p.xml: object\[0\]/bndbox/xmin: need a number, got 'nan'"),
        (xml("<object><name>dog</name></object>"), r"p.xml: object\[0\]/bndbox/xmin: missing"),
    ],
)
def test_bad_annotations_are_named_with_their_place(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        convert(voc(tmp_path / "voc", train={"p": text}), tmp_path / "out", "train")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_lists_are_named(tmp_path):
    folder = voc(tmp_path / "voc", train={"p": xml(thing())}, val={"q": xml()})
    with pytest.raises(DataError, match=r"test\.txt: No such file"):
        convert(folder, tmp_path / "out", "test")
    with pytest.raises(DataError, match="no objects in any split"):
        convert(folder, tmp_path / "out", "val")
    lists = {
        "": "no names",
        "p 1\np -1\n": "p stands 2 times",
        "p 1\n\n../p 1\n": "line 3: '../p' is no file name",
        "r\n": "r.xml: No",
    }
    for text, message in lists.items():
        (folder / "ImageSets/Main/train.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            convert(folder, tmp_path / "out", "train")
