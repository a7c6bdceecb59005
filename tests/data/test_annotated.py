from __future__ import annotations

from pathlib import Path

import pytest

from mhmoe_vl.data.annotated import Example, PictureFolders, held_out, missing_pictures, require_pictures
from mhmoe_vl.data.sample import BadSample
from mhmoe_vl.errors import DataError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("a.jpg", "below/b.png", "below/notes.txt"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def test_pictures_are_found_in_a_folder_and_below_it(folder):
    pictures = PictureFolders([folder])
    assert pictures.find("x.jpg", "b.png") == folder / "below/b.png"
    assert pictures.find("a.jpg") == folder / "a.jpg"
    assert pictures.find("x.jpg", "y.jpg") == folder / "x.jpg"
    assert pictures.find("notes.txt") == folder / "notes.txt"  # no picture: not in the index


def test_the_first_folder_wins(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.jpg").write_bytes(b"other")
    assert PictureFolders([other, folder]).find("a.jpg") == other / "a.jpg"


def test_folders_that_do_not_serve(folder, tmp_path):
    with pytest.raises(DataError, match=r"none: No such file or directory \(name a folder of pictures\)"):
        PictureFolders([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no picture in it"):
        PictureFolders([folder, tmp_path / "empty"])
    with pytest.raises(DataError, match="no folder of pictures"):
        PictureFolders([])


def test_hidden_files_and_folders_are_no_pictures(folder):
    (folder / ".cache").mkdir()
    for name in ("._a.jpg", ".cache/c.jpg", "below/._b.png"):
        (folder / name).touch()
    pictures = PictureFolders([folder])
    assert pictures.find("c.jpg") == folder / "c.jpg"  # where it would be
    assert pictures.find("._b.png", "._a.jpg", "a.jpg") == folder / "a.jpg"


def test_a_name_is_found_by_its_end(folder):
    for name in ("dev-3-1-0.png", "below/dev-13-1-0.png"):
        (folder / name).touch()
    pictures = PictureFolders([folder])
    assert pictures.find_ending("3-1-0.png") == folder / "dev-3-1-0.png"
    assert pictures.find_ending("13-1-0.png") == folder / "below/dev-13-1-0.png"
    assert not pictures.find_ending("1-0.png").exists()
    (folder / "below/train-3-1-0.png").touch()
    with pytest.raises(DataError, match=r"dev-3-1-0.png and train-3-1-0.png end alike"):
        PictureFolders([folder]).find_ending("3-1-0.png")


def test_a_missing_picture_is_a_bad_sample_and_refused_in_evaluation(folder):
    there = Example("1", None, (folder / "a.jpg",), "q.json")
    gone = [Example(str(i), None, (folder / f"gone{i}.jpg",), "q.json") for i in range(4)]
    assert there.picture() == b"a.jpg"
    with pytest.raises(BadSample, match=r"q\.json: 0: .*gone0\.jpg: No such file") as caught:
        gone[0].picture()
    assert caught.value.reason == "missing image"
    assert missing_pictures([there, gone[0], gone[0]]) == [folder / "gone0.jpg"]
    require_pictures([there])
    with pytest.raises(DataError, match=r"q\.json: 4 pictures missing: gone0\.jpg, gone1\.jpg, gone2\.jpg, \.\.\. \("):
        require_pictures([there, *gone])


def test_the_held_out_groups_depend_on_the_seed_only():
    keys = [3, 1, 2, 3, 5, 4, 4]
    drawn = held_out(keys, seed=7, count=2)
    assert len(drawn) == 2
    assert drawn == held_out(reversed(keys), seed=7, count=2) == held_out(sorted(keys), seed=7, fraction=0.4)
    assert len({frozenset(held_out(range(50), seed=seed, count=5)) for seed in range(5)}) == 5
    with pytest.raises(DataError, match="5 of 5 groups to hold out"):
        held_out(keys, seed=0, count=5)


def test_what_is_no_file_counts_as_missing(folder):
    (folder / "folder.jpg").mkdir()
    (folder / "link.jpg").symlink_to("nowhere.jpg")
    names = ["folder.jpg", "link.jpg", "x" * 300 + ".jpg"]
    pictures = PictureFolders([folder])
    examples = [Example(name, None, (pictures.find(name),), "q.json") for name in names]
    assert len(missing_pictures(examples)) == 3
    for example in examples:
        with pytest.raises(BadSample) as caught:
            example.picture()
        assert caught.value.reason == "missing image"


def test_pictures_of_any_size_are_not_read(folder, monkeypatch):
    monkeypatch.setattr("mhmoe_vl.data.annotated.MAX_MEMBER_BYTES", 4)
    with pytest.raises(BadSample, match="more than 4 bytes"):
        Example("1", None, (Path(folder / "a.jpg"),), "q.json").picture()
