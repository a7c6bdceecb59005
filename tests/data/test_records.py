"""Annotation files: read strictly, and checked with places in the messages."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_vl.data import records
from mhmoe_vl.data.records import (
    BOOLEAN,
    NUMBER,
    TEXT,
    WHOLE,
    BadRecords,
    check,
    check_lines,
    fields,
    items,
    numbers,
    one_of,
    read_json,
    read_json_lines,
)
from mhmoe_vl.errors import DataError, one_line

ENTRY = fields({"id": WHOLE, "bbox": numbers(4)}, {"note": TEXT})
FILE = fields({"annotations": items(ENTRY, unique="id")})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "annotations.json"


def refusal(path: Path, read=read_json) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(value=JSON_VALUES, packed=st.booleans(), ascii_only=st.booleans())
def test_what_json_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, value: object, packed: bool, ascii_only: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    data = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    path.write_bytes(gzip.compress(data, 1, mtime=0) if packed else data)
    assert read_json(path) == value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "line 1, byte 0: nothing here"),
        (b" \n\n", "line 1, byte 0: nothing here"),
        (b'{"a": [1,\n2', "line 2, byte 11: JSON ends in the middle"),
        (b'[\n"abc', "line 2, byte 2: JSON ends in the middle"),
        (b"[1,]", "line 1, byte 3: not JSON: "),
        ('["é",\n x]'.encode(), "line 2, byte 8: not JSON: "),
        (b"[1] [2]", "line 1, byte 4: not JSON: Extra data"),
        (b"\xef\xbb\xbf[]", "byte 0: a byte order mark"),
        (b"\xff\xfe[\0]\0", "byte 0: a byte order mark"),
        (b'["a",\n"\xe9"]', "line 2, byte 7: not UTF-8"),
        (b"[1,\nNaN]", "line 2, byte 4: NaN is no finite number"),
        (b'["NaN", -Infinity]', "line 1, byte 8: -Infinity is no finite number"),
        (b'{"a": 1e999}', "line 1, byte 6: 1e999 is no finite number"),
        (b"[1" + 5000 * b"0" + b"]", "line 1, byte 1: 1000000"),
        (b'{"a": {"b": 1},\n"a": 2}', 'line 2, byte 16: key "a" stands twice in one object'),
        (b'[{"b": 1}, {"\\u0062": 1, "b": [2]}]', 'line 1, byte 25: key "b" stands twice in one object'),
        (b"[\n" + 100_000 * b"[", "line 2, byte 101: nested deeper than 100 levels"),
        (100_000 * b'{"a":' + 100_000 * b"}", "line 1, byte 500: nested deeper than 100 levels"),
        (b"\x1f\x8b\x08\x00", "damaged gzip file: "),
        (gzip.compress(b"[1, 2, 3]", mtime=0)[:-9], "damaged gzip file: "),
        (gzip.compress(b'[1, "a":]', mtime=0), "line 1, byte 7: not JSON: "),
    ],
    ids=lambda value: one_line(value[:30]) if isinstance(value, bytes) else "",
)
def test_what_is_not_strict_json_is_refused_with_its_place(path: Path, data: bytes, message: str) -> None:
    path.write_bytes(data)
    assert refusal(path).startswith(message)


def test_a_gzipped_file_with_a_flipped_bit_is_refused(path: Path) -> None:
    data = bytearray(gzip.compress(json.dumps(list(range(1000))).encode()))
    data[-6] ^= 1
    path.write_bytes(data)
    assert refusal(path).startswith("damaged gzip file: ")


def test_a_missing_file_and_a_folder_are_refused(path: Path, tmp_path: Path) -> None:
    assert refusal(path) == "No such file or directory (name a readable file)"
    assert refusal(tmp_path) == "Is a directory (name a readable file)"


def test_a_small_file_that_unpacks_to_too_much_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_BYTES", 2**20)
    path.write_bytes(gzip.compress(b"[" + b" " * 2**25 + b"]", mtime=0))
    assert refusal(path).startswith("more than 1048576 bytes")


def test_lines_are_numbered_and_only_line_feeds_end_them(path: Path) -> None:
    path.write_text('{"a": "x\u2028y"}\r\n[2]\n', encoding="utf-8")
    assert read_json_lines(path) == [{"a": "x\u2028y"}, [2]]
    path.write_text('1\n2\n{"a": 1, "a": 2}\n')
    assert refusal(path, read_json_lines).startswith('line 3, byte 9: key "a" stands twice')
    path.write_text("1\n\n3\n")
    assert refusal(path, read_json_lines).startswith("line 2, byte 0: nothing here")
    path.write_text('1\n{"a": ')
    assert refusal(path, read_json_lines).startswith("line 2, byte 6: JSON ends in the middle")


def test_a_value_as_described_passes() -> None:
    value = {"annotations": [{"id": 1, "bbox": [0, 0.5, 1, 2], "note": "é", "more": None}, {"id": 2, "bbox": [0] * 4}]}
    check("a.json", value, FILE)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "a.json: need an object, got a list of 0 (mend the file)"),
        ({}, "a.json: annotations: missing (mend the file)"),
        ({"annotations": {"1": 2}}, "a.json: annotations: need a list, got an object of 1 (mend the file)"),
        ({"annotations": [7]}, "a.json: annotations[0]: need an object, got 7 (mend the file)"),
        (
            {"annotations": [{"id": 1, "bbox": [0] * 4}, {"id": 2, "bbox": None}]},
            "a.json: annotations[1].bbox: need 4 numbers, got null (mend the file)",
        ),
        (
            {"annotations": [{"id": i, "bbox": [0] * 4} for i in (5, 6, 5)]},
            "a.json: annotations[2].id: 5 stands already at [0] (mend the file)",
        ),
        (
            {"annotations": [{"id": "12", "bbox": [1, 2, 3]}, {"id": True}, {"note": 3}]},
            'a.json: annotations[0].id: need a whole number, got "12"; annotations[0].bbox: need 4 numbers, got a list '
            "of 3; annotations[1].bbox: missing; and 4 more problems (mend the file)",
        ),
    ],
)
def test_a_value_that_is_not_as_described_is_refused(value: object, message: str) -> None:
    with pytest.raises(BadRecords) as caught:
        check("a.json", value, FILE)
    assert str(caught.value) == message


def test_all_problems_can_be_listed_one_a_line() -> None:
    with pytest.raises(BadRecords) as caught:
        check("a.json", {"annotations": [{}] * 10}, FILE)
    assert len(caught.value.lines) == 20
    assert caught.value.lines[19] == "a.json: annotations[9].bbox: missing"


def test_lines_are_checked_by_their_numbers() -> None:
    values = [{"id": 1, "bbox": [0] * 4}, 3, {"id": 1, "bbox": [0, 0, 0, "1"]}]
    with pytest.raises(BadRecords) as caught:
        check_lines("a.json", values, ENTRY, unique="id")
    assert caught.value.lines == [
        "a.json: line 2: need an object, got 3",
        "a.json: line 3: bbox: need 4 numbers, got a list of 4",
        "a.json: line 3: id: 1 stands already at line 1",
    ]
    check_lines("a.json", values[:1], ENTRY, unique="id")


@pytest.mark.parametrize(
    ("wanted", "good", "bad"),
    [
        (WHOLE, [0, -5, 2**63 - 1], [1.0, True, "1", None, 2**63, 10**40]),
        (NUMBER, [0, 1.5, 1e300], [True, "1", None, float("nan"), float("inf"), 10**400]),
        (TEXT, ["", "é", "a\nb"], [None, 1, ["a"], "\ud800"]),
        (BOOLEAN, [True, False], ["true", 1, None]),
        (numbers(2), [[1, 2.5]], [[1], [1, None], [1, float("inf")], "12", None]),
        (one_of("a", "b"), ["a", "b"], ["A", None, ["a"], 1]),
    ],
)
def test_leaves(wanted: records.Check, good: list, bad: list) -> None:
    assert not any(wanted(value) for value in good)
    for value in bad:
        ((place, what),) = wanted(value)
        assert place == ""
        assert what.startswith("need ")
        assert what.isprintable()
        assert len(what) < 120
