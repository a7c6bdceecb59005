"""The gallery's files: safe small copies, nothing left over, and what is broken named in one line."""

from __future__ import annotations

import json
import os
import struct
import zlib

import pytest
from PIL import Image

from mhmoe_vl.analysis import gallery
from mhmoe_vl.analysis.gallery import read_gallery, write_gallery
from mhmoe_vl.errors import DataError


def card(*images, **changes) -> dict:
    return {"images": list(images), "caption": "", "right": None, "rows": [], "bars": []} | changes


def files(run) -> set[str]:
    return {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (800, 400), "red").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


# --------------------------------------------------------------------------------------------- writing
def test_the_files_of_a_gallery(run, photo):
    write_gallery(run, [card(photo, photo, caption="two", right=True, rows=[["a", 1]], bars=[["b", 0.5]]), card(photo)])
    names = ["gallery/000-0.jpg", "gallery/000-1.jpg", "gallery/001-0.jpg"]
    assert files(run) == {"gallery.json", *names}
    first = {"images": names[:2], "caption": "two", "right": True, "rows": [["a", 1]], "bars": [["b", 0.5]]}
    assert json.loads((run / "gallery.json").read_text()) == [first, card(names[2])]
    with Image.open(run / names[0]) as copy:
        assert (copy.format, copy.size) == ("JPEG", (320, 160))


def test_names_of_pictures_do_not_come_along(run, photo):
    odd = photo.rename(photo.with_name('"><script>\u202e\udcff\n.png'))
    write_gallery(run, [card(odd)])
    assert json.loads((run / "gallery.json").read_text()) == [card("gallery/000-0.jpg")]


def test_pictures_are_upright_and_carry_nothing_else(run, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "secret"  # turn by 90 degrees; a description
    Image.new("RGB", (200, 100)).save(tmp_path / "photo.jpg", exif=exif, comment=b"secret")
    write_gallery(run, [card(tmp_path / "photo.jpg")])
    data = (run / "gallery/000-0.jpg").read_bytes()
    with Image.open(run / "gallery/000-0.jpg") as copy:
        assert copy.size == (100, 200) and not copy.getexif()
    assert b"secret" not in data


def test_twice_the_same_bytes(run, photo):
    write_gallery(run, [card(photo)])
    first = {name: (run / name).read_bytes() for name in files(run)}
    write_gallery(run, [card(photo)])
    assert {name: (run / name).read_bytes() for name in files(run)} == first


def test_old_pictures_go_and_other_files_stay(run, photo):
    write_gallery(run, [card(photo, photo)] * 3)
    (run / "gallery" / "mine.jpg").write_bytes(b"mine")
    write_gallery(run, [card(photo)])
    assert files(run) == {"gallery.json", "gallery/000-0.jpg", "gallery/mine.jpg"}
    write_gallery(run, [])
    assert files(run) == {"gallery.json", "gallery/mine.jpg"} and read_gallery(run) == ([], 0)


def test_a_failed_write_leaves_the_old_list(run, photo, monkeypatch):
    write_gallery(run, [card(photo, caption="old")])

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_gallery(run, [card(caption="new")])
    assert read_gallery(run)[0][0].caption == "old"


def png_bomb(path, width: int, height: int) -> None:
    """A PNG of the given size in a few kilobytes, all black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + width // 8)
    data = b"".join(packer.compress(row) for _ in range(min(height, 2000))) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


@pytest.fixture
def broken(tmp_path, photo) -> dict:
    """Things that are no pictures to show, by name."""
    png_bomb(tmp_path / "bomb.png", 60_000, 60_000)
    png_bomb(tmp_path / "wide.png", 20_000, 8)
    (tmp_path / "text.jpg").write_text("<svg onload=alert(1)>")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:60])
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(2**40)
    os.mkfifo(tmp_path / "pipe.jpg")
    names = ("bomb.png", "wide.png", "text.jpg", "empty.jpg", "cut.png", "huge.jpg", "pipe.jpg", "none.jpg")
    odd = {"folder": tmp_path, "nul": "a\0b.jpg", "surrogate": "\ud800.jpg", "nameless": "", "device": "/dev/zero"}
    return {name: tmp_path / name for name in names} | odd


def test_unreadable_pictures_leave_cards_without_pictures(run, photo, broken):
    write_gallery(run, [card(path, photo, caption=name) for name, path in broken.items()] + [card(photo)])
    cards, count = read_gallery(run)
    assert [c.caption for c in cards if not c.pictures] == list(broken) and count == len(broken) + 1
    assert len(cards[-1].pictures) == 1
    assert files(run) == {"gallery.json", f"gallery/{len(broken):03}-0.jpg"}


def test_values_that_are_not_finite_are_written_as_null(run):
    nan, inf = float("nan"), float("inf")
    write_gallery(run, [card(rows=[["a", nan], ["b", -inf]], bars=[["c", nan], ["d", inf], ["e", 1 + 1e-7]])])
    [entry] = json.loads((run / "gallery.json").read_text(), parse_constant=pytest.fail)
    assert entry["rows"] == [["a", None], ["b", None]] and entry["bars"] == [["c", None], ["d", None], ["e", 1.0]]


# --------------------------------------------------------------------------------------------- reading
def test_the_true_answer_is_the_one_that_a_row_names(run):
    write_gallery(run, [card(rows=[["answer", "no"], ["true answer", 3]], bars=[["no", 0.5], ["3", 0.25], ["x", 0.0]])])
    [[found], _] = read_gallery(run)
    assert [(bar.name, bar.text, bar.true) for bar in found.bars] == [
        ("no", "50.0 %", False), ("3", "25.0 %", True), ("x", "0.0 %", False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "place"),
    [
        ({}, "need a list"),
        ([7], r"\[0\]: need an object"),
        ([{}], r"\[0\]\.images: missing; \[0\]\.caption: missing; \[0\]\.right: missing; and 2 more"),
        ([card(images=None)], r"\[0\]\.images: need a list"),
        ([card(7)], r"\[0\]\.images\[0\]: need a name like"),
        ([card("../photo.png")], r"need a name like gallery/000-0\.jpg, got \"\.\./photo\.png\" \(mend the file\)$"),
        ([card("/etc/hostname")], "need a name like"),
        ([card("gallery/../000-0.jpg")], "need a name like"),
        ([card("gallery/000-0.jpg\n")], "need a name like"),
        ([card("gallery/000-0.jpg\0")], "need a name like"),
        ([card(), card(caption=7)], r"\[1\]\.caption: need a text, got 7"),
        ([card(right=1)], r"\[0\]\.right: need true, false or null, got 1"),
        ([card(rows=[["a"]])], r"\[0\]\.rows\[0\]: need a name and one value"),
        ([card(rows=[["a", [1]]])], r"\[0\]\.rows\[0\]: need a name and one value"),
        ([card(rows=["ab"])], r"\[0\]\.rows\[0\]: need a name and one value"),
        ([card(bars=[["a", 1.5]])], r"\[0\]\.bars\[0\]: need a name and a share of 0 to 1"),
        ([card(bars=[["a", True]])], r"\[0\]\.bars\[0\]: need a name and a share"),
        ([card(bars=[[1, 0.5]])], r"\[0\]\.bars\[0\]: need a name and a share"),
    ],
)
def test_a_broken_entry_is_one_clear_error(run, entries, place):
    (run / "gallery.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match=place) as caught:
        read_gallery(run)
    assert str(caught.value).startswith(f"{run / 'gallery.json'}: ") and str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, '[{"caption": NaN}]', '[{"right": true, "right": false}]'])
def test_what_is_no_json_is_one_clear_error(run, text):
    (run / "gallery.json").write_text(text)
    with pytest.raises(DataError, match=r"gallery\.json: line 1, byte \d+: "):
        read_gallery(run)


def test_a_picture_of_the_gallery_must_be_one(run, broken):
    (run / "gallery.json").write_text(json.dumps([card("gallery/000-0.jpg")]))
    (run / "gallery").mkdir()
    for path in filter(os.path.exists, broken.values()):
        (run / "gallery/000-0.jpg").symlink_to(path)
        with pytest.raises(DataError, match=r"000-0\.jpg: not a picture to show: .* \(use JPEG, PNG or WebP\)$"):
            read_gallery(run)
        (run / "gallery/000-0.jpg").unlink()
    with pytest.raises(DataError, match=r"000-0\.jpg: not a picture to show: no such file"):
        read_gallery(run)


def test_a_picture_outside_of_the_run_is_refused(run, photo):
    write_gallery(run, [card(photo)])
    (run / "gallery/000-0.jpg").unlink()
    (run / "gallery/000-0.jpg").symlink_to(photo)
    with pytest.raises(DataError, match=r"000-0\.jpg: a link out of the run folder \(copy the picture in\)$"):
        read_gallery(run)


def test_pictures_of_cards_that_are_not_shown_are_not_read(run):
    (run / "gallery.json").write_text(json.dumps([card()] * gallery.MAX_CARDS + [card("gallery/048-0.jpg")]))
    cards, count = read_gallery(run)
    assert (len(cards), count) == (48, 49)
