from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import packing
import pytest
from PIL import Image

from mhmoe_vl.errors import DataError

ROOT = Path(__file__).parents[2]


def test_split_is_a_partition_by_seed():
    items = list(range(100))
    splits = packing.split(items, 0.1, 3)
    assert len(splits["val"]) == 10 and sorted(splits["train"] + splits["val"]) == items
    assert splits == packing.split(items, 0.1, 3) != packing.split(items, 0.1, 4)
    assert sorted(packing.split(items, 0.0, 3)[""]) == items
    assert len(packing.split(items[:3], 0.01, 0)["val"]) == 1
    with pytest.raises(DataError, match="1 items cannot be split"):
        packing.split(items[:1], 0.5, 0)


def encoded(format: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (40, 40)).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.jpg", encoded("JPEG"), None),
        ("cmyk.jpg", encoded("JPEG", "CMYK"), None),
        ("really.jpg", encoded("PNG"), None),
        ("cut.jpg", encoded("JPEG")[:-60], "not a readable picture: "),
        ("cut.png", encoded("PNG")[:60], "not a readable picture: "),
        ("empty.jpg", b"", "not a readable picture: "),
        ("text.jpg", b"<html>not found</html>", "not a readable picture: "),
        ("moving.gif", encoded("GIF"), "not a readable picture: format GIF, not one of JPEG, PNG, WEBP"),
    ],
)
def test_pictures_are_judged_by_what_is_in_them(name, data, problem, tmp_path):
    (tmp_path / name).write_bytes(data)
    found = packing.picture_problem(tmp_path, name)
    assert (found is None) if problem is None else found.startswith(f"{tmp_path / name}: {problem}")


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/passwd", "x/../../a.jpg", "a\n.jpg"])
def test_names_stay_in_the_folder(name, tmp_path):
    assert "not a plain path inside" in packing.picture_problem(tmp_path, name)


def test_the_ending_follows_the_content(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded("PNG"))
    assert packing.picture_member(tmp_path / "a.jpg") == ("png", encoded("PNG"))


def test_too_many_pixels(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    for limit in (1000, 700):  # PIL warns above its limit and raises above twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert packing.picture_problem(tmp_path, "a.png") == f"{tmp_path}/a.png: too many pixels (shrink it)"


def test_foreign_shards_are_not_continued(tmp_path):
    (tmp_path / "shard-000000.tar").write_bytes(b"")
    with pytest.raises(DataError, match="already there and not from this script"):
        packing.pack(tmp_path, {"": ["a"]}, dict, {}, samples_per_shard=1, processes=1)


@pytest.mark.parametrize("script", sorted(p.stem for p in (ROOT / "data_prep").glob("*.py")))
def test_every_door_explains_itself(script, run_script):
    source = (ROOT / "data_prep" / f"{script}.py").read_text()
    if "__main__" not in source:
        return
    done = subprocess.run(
        [sys.executable, f"data_prep/{script}.py", "--help"],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT), "COLUMNS": "200"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    packs = "make_parser" in source
    for option in ("--out", *(("--seed", "--processes", "--samples-per-shard", "--val-fraction") if packs else ())):
        assert option in done.stdout
    code, error = run_script(script)
    assert code == 2 and error.startswith("error: the following arguments are required: ") and "--out" in error
    assert error.count("\n") == 1
