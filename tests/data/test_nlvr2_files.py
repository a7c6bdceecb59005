"""NLVR2's and NLVR's files: the real ones read, and what is wrong is one line that says where."""

from __future__ import annotations

import copy
import json

import pytest

from mhmoe_vl.data.annotated import PictureFolders, missing_pictures
from mhmoe_vl.data.nlvr2 import read_statements
from mhmoe_vl.errors import DataError

LINES = [
    {"identifier": "dev-850-0-0", "sentence": "One is red.", "label": "True"},
    {"identifier": "dev-850-0-1", "sentence": "Both are.", "label": "false"},
    {"identifier": "dev-850-1-0", "sentence": "One is red.", "label": False},
]


@pytest.fixture
def read(tmp_path):
    (tmp_path / "12").mkdir()
    for name in ("dev-850-0-img0.png", "12/dev-850-0-img1.png", "dev-3-1-0.png"):
        (tmp_path / name).touch()

    def run(lines):
        (tmp_path / "dev.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return read_statements(tmp_path / "dev.json", PictureFolders([tmp_path]))

    return run


def test_pairs(read, tmp_path):
    first, second, third = read(LINES)
    assert first.pictures == (tmp_path / "dev-850-0-img0.png", tmp_path / "12/dev-850-0-img1.png")
    assert [e.record.label for e in (first, second, third)] == [True, False, False]
    assert len(missing_pictures([first, second, third])) == 2  # the pair 850-1


def test_drawn_pictures(read, tmp_path):
    [found] = read([{"identifier": "3-1", "sentence": "x", "label": "true"}])
    assert found.pictures == (tmp_path / "dev-3-1-0.png",)


@pytest.mark.parametrize(
    ("line", "change", "message"),
    [
        (1, {"sentence": " "}, r'line 2: sentence: need a text that is not empty, got " "'),
        (1, {"identifier": "dev-850-0"}, "line 2: identifier: need an identifier such as"),
        (1, {"identifier": "dev-850-0-0"}, "line 2: identifier: .* stands already at line 1"),
        (2, {"label": "maybe"}, r'line 3: label: need True or False, got "maybe"'),
        (2, {"label": None}, "line 3: label: need True or False, got null"),
        (2, {"identifier": "7-1"}, "keep NLVR and NLVR2 in files of their own"),
        (0, {"identifier": None}, "line 1: identifier: need an identifier"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(read, line, change, message):
    lines = copy.deepcopy(LINES)
    lines[line].update(change)
    with pytest.raises(DataError, match=message) as caught:
        read(lines)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "images", "count", "pictures"),
    [("nlvr2/with_images.json", "nlvr2/images", 16, 2), ("nlvr1/dev/dev.json", "nlvr1/dev/images", 989, 1)],
)
def test_the_real_files(data_dir, file, images, count, pictures):
    found = read_statements(data_dir / file, PictureFolders([data_dir / images]))
    assert len(found) == count and {len(e.pictures) for e in found} == {pictures}
    assert missing_pictures(found) == []
