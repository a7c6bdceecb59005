"""Class folders, class lists and the classes in shards: what is read, and what is refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny_finetune import picture

from mhmoe_vl.data.labelled import (
    Chosen,
    ImageFolder,
    class_folders,
    class_root,
    label_in_shard,
    open_labelled,
    read_classes,
    sample_keys,
)
from mhmoe_vl.data.sample import BadSample, Sample
from mhmoe_vl.data.shards import ShardSet
from mhmoe_vl.data.writing import write_shard
from mhmoe_vl.errors import ConfigError, DataError

NAMES = ("n01440764", "n01443537", "n02 odd name")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        (tmp_path / name / "deeper").mkdir(parents=True)
        (tmp_path / name / "b.JPEG").write_bytes(picture("red"))
        (tmp_path / name / "deeper" / "a.png").write_bytes(picture("blue"))
        for _ in range(number):
            (tmp_path / name / "c.webp").write_bytes(b"")
        (tmp_path / name / ".hidden.jpg").write_bytes(b"")
        (tmp_path / name / "notes.txt").write_text("")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "LOC_synset_mapping.txt").write_text("")
    return tmp_path


def test_pictures_with_the_numbers_of_their_folders(root):
    assert class_folders(root) == sorted(NAMES)
    found = ImageFolder(root, NAMES)
    assert [(e.key, e.record) for e in found][:3] == [
        ("n01440764/b.JPEG", 0),
        ("n01440764/deeper/a.png", 0),
        ("n01443537/b.JPEG", 1),
    ]
    assert len(found) == 8 and found[0].picture() == picture("red")
    assert [e.record for e in ImageFolder(root, NAMES[::-1])] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [e.key for e in Chosen(found, [7, 0])] == ["n02 odd name/deeper/a.png", "n01440764/b.JPEG"]


def test_pictures_of_formats_that_cannot_be_read_do_not_go_unnoticed(root):
    (root / NAMES[0] / "d.bmp").write_bytes(b"BM")
    assert "n01440764/d.bmp" in sample_keys(ImageFolder(root, NAMES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "zebra").mkdir(), "class 'zebra' is not among the 3 classes"),
        (
            lambda root: os.rename(root / NAMES[1], root / ".gone"),
            "class 'n01443537' has no folder, but is among the 3",
        ),
        (lambda root: [path.unlink() for path in (root / NAMES[0]).rglob("*.*")], "n01440764: no picture in it"),
    ],
)
def test_folders_that_are_not_the_classes_are_refused(root, change, message):
    change(root)
    with pytest.raises(DataError) as caught:
        ImageFolder(root, NAMES)
    assert message in str(caught.value) and str(root) in str(caught.value)


def test_a_folder_without_classes_is_refused(tmp_path):
    for folder, message in ((tmp_path, "no class folder and no"), (tmp_path / "none", "No such file or directory")):
        with pytest.raises(DataError, match=message):
            class_folders(folder)


def test_a_class_of_no_text_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"\xff")).mkdir()
    with pytest.raises(DataError, match="is not UTF-8"):
        class_folders(tmp_path)


def test_folders_and_shards_are_told_apart(root, tmp_path):
    assert class_root("n01440764", root) == root / "n01440764"
    shard = root / "shards" / "a.tar"
    shard.parent.mkdir()
    write_shard(shard, [("0", {"jpg": picture("red"), "cls": "2"})])
    assert class_root("shards", root) is None and class_root(["n01440764"], root) is None
    source = open_labelled("shards", root, NAMES)
    assert isinstance(source, ShardSet) and list(sample_keys(source)) == [0]
    assert label_in_shard(source[0], 3) == 2
    with pytest.raises(ConfigError, match="pipe"):
        open_labelled("pipe:cat a.tar", root, NAMES)


@pytest.mark.parametrize(
    ("members", "reason", "message"),
    [
        ({}, "missing class", "a.tar:k: no member cls"),
        ({"cls": b"3"}, "class", "member cls is '3' (a class is a number of 0 to 2; check task.classes)"),
        ({"cls": b"-1"}, "class", "member cls is '-1'"),
        ({"cls": b"1.0"}, "class", "member cls is '1.0'"),
        ({"cls": b"cat\x1b[2J"}, "class", r"member cls is 'cat\\x1b[2J'"),
        ({"cls": "٢".encode()}, "class", "member cls is"),
        ({"cls": b"9" * 5000}, "class", "member cls is '999"),
        ({"cls": b"\xff"}, "text", "member cls is not UTF-8"),
        ({"cls": b" "}, "empty text", "member cls is empty"),
    ],
)
def test_a_class_that_is_none_is_a_bad_sample(members, reason, message):
    with pytest.raises(BadSample) as caught:
        label_in_shard(Sample("k", members, "a.tar", 0), 3)
    assert caught.value.reason == reason and message in str(caught.value)
    assert label_in_shard(Sample("k", {"cls": b"2\n"}, "a.tar", 0), 3) == 2


def test_class_lists(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(NAMES))
    (tmp_path / "a.txt").write_text("\n".join(NAMES) + "\n")
    assert read_classes(tmp_path / "a.json") == read_classes(tmp_path / "a.txt") == list(NAMES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["a", "b", "a"]', "class 'a' stands twice"),
        ("[]", "no class"),
        ('["a", " "]', "class 1: ' '"),
        ('["' + "x" * 256 + '"]', "in 1 to 255 bytes"),
        ('["a", 3]', "[1]"),
        ('{"a": 0}', "a list"),
    ],
)
def test_odd_class_lists_are_refused(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(DataError) as caught:
        read_classes(tmp_path / "c.json")
    assert message in str(caught.value) and "c.json" in str(caught.value)
