"""NLVR2's and NLVR's files: the real ones read, and what is wrong is one line that says where."""

from __future__ import annotations

import copy
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutate, mutate_text

from mhmoe_vl.data.annotated import PictureFolders, missing_pictures
from mhmoe_vl.data.nlvr2 import read_statements, truth_value
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


def test_labels_may_be_absent_from_all_lines_only(read):
    bare = [{key: line[key] for key in ("identifier", "sentence")} for line in LINES]
    assert [e.record.label for e in read(bare)] == [None] * 3
    with pytest.raises(DataError, match="line 3: 1 of 3 examples without label: "):
        read([*LINES[:2], bare[2]])


@pytest.mark.parametrize(
    ("label", "value"),
    [("True", True), ("true", True), (True, True), ("FALSE", False), (False, False)]
    + [(bad, None) for bad in (None, 1, 0, "", "yes", "1", "True ", [True])],
)
def test_truth_values(label, value):
    assert truth_value(label) is value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1, byte 0: nothing here"),
        ('{"identifier": "dev-1-0-0",\n', "line 1, byte 27: JSON ends in the middle"),
        ("\ufeff{}", "byte 0: a byte order mark"),
        ('{"identifier": Infinity}', "line 1, byte 15: Infinity is no finite number"),
        ("{}\n\n{}", "line 2, byte 0: nothing here"),
        ("[]", "line 1: need an object, got a list of 0"),
        pytest.param("[" * 100_000, "line 1, byte 100: nested deeper than 100 levels", id="nested"),
    ],
)
def test_what_is_no_official_file_is_named_with_its_place(read, tmp_path, text, message):
    read(LINES)
    (tmp_path / "dev.json").write_text(text)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_statements(tmp_path / "dev.json", PictureFolders([tmp_path]))
    assert "\n" not in str(caught.value)


def test_a_pair_in_one_file_is_refused(read, tmp_path):
    (tmp_path / "12" / "dev-850-0-img1.png").unlink()
    (tmp_path / "dev-850-0-img1.png").hardlink_to(tmp_path / "dev-850-0-img0.png")
    with pytest.raises(DataError, match=r"line 1: the pictures dev-850-0-img0.png and dev-850-0-img1.png are one file"):
        read(LINES)


def test_left_and_right_exchanged_by_links_are_refused(read, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "links").mkdir()
    for side, other in ((0, 1), (1, 0)):
        (tmp_path / "real" / f"dev-850-1-img{side}.png").touch()
        (tmp_path / "links" / f"dev-850-1-img{side}.png").symlink_to(tmp_path / "real" / f"dev-850-1-img{other}.png")
    with pytest.raises(DataError, match=r"line 3: the picture dev-850-1-img0.png is a link to dev-850-1-img1.png"):
        read(LINES)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rng=st.randoms(use_true_random=False), drawn=st.booleans(), as_text=st.booleans())
def test_any_change_reads_or_is_one_line(tmp_path, rng, drawn, as_text):
    (tmp_path / "dev-3-1-0.png").touch()
    good = [line | {"identifier": f"3-{i}"} for i, line in enumerate(LINES)] if drawn else LINES
    text = "".join(json.dumps(line) + "\n" for line in (good if as_text else mutate(good, rng)))
    (tmp_path / "dev.json").write_text(mutate_text(text, rng) if as_text else text)
    try:
        found = read_statements(tmp_path / "dev.json", PictureFolders([tmp_path]))
    except DataError as error:
        assert str(error).startswith(f"{tmp_path}/") and str(error).isprintable()
        return
    assert {len(e.pictures) for e in found} == ({1} if drawn else {2})
    assert len({e.key for e in found}) == len(found)
    assert len(missing_pictures(found)) <= 2 * len(found)
    for example in found:
        example.record.sentence.encode()


@pytest.mark.parametrize(
    ("file", "images", "count", "pictures"),
    [("nlvr2/with_images.json", "nlvr2/images", 16, 2), ("nlvr1/dev/dev.json", "nlvr1/dev/images", 989, 1)],
)
def test_the_real_files(data_dir, file, images, count, pictures):
    found = read_statements(data_dir / file, PictureFolders([data_dir / images]))
    assert len(found) == count and {len(e.pictures) for e in found} == {pictures}
    assert missing_pictures(found) == []
