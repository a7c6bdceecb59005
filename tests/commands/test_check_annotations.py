"""``mhmoe-vl check-data`` on annotation files: each kind known, everything that is wrong listed, never a disagreement
with what the tasks read."""

from __future__ import annotations

import copy
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutate, mutate_text
from ten_rows import ANNOTATIONS, COCO, FILES, FLICKR8K, KARPATHY, NLVR, NLVR2, QUESTIONS, text, write_pictures

from mhmoe_vl import commands
from mhmoe_vl.data.annotated import PictureFolders, missing_pictures
from mhmoe_vl.data.captions import read_captions
from mhmoe_vl.data.nlvr2 import read_statements
from mhmoe_vl.data.vqa import LEARNT, read_annotations, read_questions
from mhmoe_vl.errors import DataError

Check = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def check(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Writes files, runs the command with ``--json``: exit code and report, paths without the folder."""

    def run(files: dict[str, Any], *options: object) -> tuple[int, dict[str, Any]]:
        for name, value in files.items():
            (tmp_path / name).write_text(text(value), newline="")
        capsys.readouterr()
        arguments = [*(str(tmp_path / name) for name in files), *map(str, options or ["--images", images])]
        code = commands.main(["check-data", "--json", *arguments])
        return code, json.loads(capsys.readouterr().out.replace(f"{tmp_path}/", ""))

    return run


def listed(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    return [(p["file"], p["place"], p["reason"], p["message"]) for p in report["problems"]]


def changed(value: Any, *path: Any, to: Any) -> Any:
    value = copy.deepcopy(value)
    place = value
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = to
    return value


@pytest.mark.parametrize(
    ("name", "kind", "entries", "pictures"),
    [
        ("vqa-questions", "vqa-questions", 10, 5),
        ("vqa-annotations", "vqa-annotations", 10, 0),
        ("nlvr2", "nlvr", 10, 10),
        ("nlvr", "nlvr", 10, 10),
        ("coco-captions", "coco-captions", 10, 10),
        ("karpathy", "karpathy", 10, 10),
        ("flickr8k", "flickr8k", 10, 5),
    ],
)
def test_every_kind_is_known_by_its_content(check, name, kind, entries, pictures):
    code, report = check({"a.txt": FILES[name]})
    assert code == 0
    assert report["files"] == [{"file": "a.txt", "kind": kind, "entries": entries, "pictures": pictures}]
    assert (report["problems"], report["reasons"]) == ([], {})


def test_all_that_is_wrong_is_listed_with_its_place_and_counted(check):
    questions = changed(QUESTIONS, "questions", 1, to={"question_id": 10, "image_id": "1", "question": " "})
    questions["questions"][7].pop("question")
    code, report = check({"q.json": questions})
    assert code == 1
    assert listed(report) == [
        ("q.json", "questions[1].image_id", "wrong value", 'need a whole number, got "1"'),
        ("q.json", "questions[1].question", "wrong value", 'need a text that is not empty, got " "'),
        ("q.json", "questions[7].question", "missing key", "missing"),
        ("q.json", "questions[1].question_id", "duplicate", "10 stands already at [0]"),
    ]
    assert report["reasons"] == {"wrong value": 2, "missing key": 1, "duplicate": 1}


@pytest.mark.parametrize(
    ("value", "problems"),
    [
        (
            changed(COCO, "annotations", 3, "image_id", to=99),
            [("annotations[3].image_id", "does not fit", "99 is not in images")],
        ),
        (
            changed(COCO, "images", 3, "file_name", to=COCO["images"][1]["file_name"]),
            [("images[3]", "does not fit", "has the picture of images[1], COCO_val2014_000000000002.jpg")],
        ),
        (changed(COCO, "images", to=[]), None),
        (
            changed(KARPATHY, "images", 2, "sentences", 1, "raw", to=""),
            [("images[2].sentences[1].raw", "wrong value", 'need a text that is not empty, got ""')],
        ),
        (
            changed(NLVR2, 4, "label", to="yes"),
            [("line 5: label", "wrong value", 'need True or False, got "yes"')],
        ),
        (
            [*NLVR2, NLVR2[3]],
            [("line 11: identifier", "duplicate", '"dev-7-3-0" stands already at line 4')],
        ),
        (
            text(NLVR2[:2]) + '{"identifier": \n{"identifier": NaN}\n' + text(NLVR2[2:]),
            [
                ("line 3, byte 15", "syntax", "JSON ends in the middle (get the file again)"),
                ("line 4, byte 15", "syntax", "NaN is no finite number (mend the file)"),
            ],
        ),
        (
            changed(ANNOTATIONS, "annotations", 2, "answers", to=[]),
            [("annotations[2].answers", "wrong value", "need at least 1, got none")],
        ),
        (
            FLICKR8K + "a.jpg\nb.gif,x\n",
            [
                ("line 12", "wrong value", "need image,caption, got 1 values: put a caption with commas in quotes"),
                ("", "missing image", "b.gif"),
            ],
        ),
        ('{"images": [', [("line 1, byte 12", "syntax", "JSON ends in the middle (get the file again)")]),
        ("\ufeff{}", [("", "syntax", "byte 0: a byte order mark (save it as UTF-8 without BOM)")]),
        ('{"licenses": []}', [("", "kind", "none of the kinds that are known by their content")]),
        (
            changed(COCO, "annotations", to=[{"id": 1, "image_id": 1, "bbox": [0, 0, 1, 1]}]),
            [("", "kind", "none of the kinds that are known by their content")],
        ),
        ("[]", [("", "kind", "none of the kinds that are known by their content")]),
        ("<html>", [("line 1", "syntax", "need image,caption, got ")]),
    ],
)
def test_each_mistake_has_its_place_and_reason(check, value, problems):
    code, report = check({"a.json": value})
    assert code == 1
    if problems is None:
        return
    found = listed(report)
    assert len(found) == len(problems)
    for (file, place, reason, message), wanted in zip(found, problems, strict=True):
        assert file == "a.json" and wanted[2] in message
        assert (place, reason) == wanted[:2] or wanted[1] == reason == "missing image"


def test_pictures_that_are_missing_cut_or_no_pictures(check, images, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    (folder / "dev-7-1-img0.png").unlink()
    cut = (folder / "dev-7-3-img1.png").read_bytes()[:45]
    (folder / "dev-7-3-img1.png").write_bytes(cut)
    (folder / "dev-7-4-img0.png").write_bytes(b"GIF89a")
    code, report = check({"dev.json": NLVR2}, "--images", folder)
    assert code == 1 and report["reasons"] == {"missing image": 1, "unreadable image": 2}
    places = [(place, reason, message.partition(": ")[0]) for _, place, reason, message in listed(report)]
    assert places == [
        ("line 2", "missing image", "pictures/dev-7-1-img0.png"),
        ("line 4", "unreadable image", "pictures/dev-7-3-img1.png"),
        ("line 5", "unreadable image", "pictures/dev-7-4-img0.png"),
    ]


def test_a_pair_that_is_one_file_is_listed(check, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    (folder / "dev-7-2-img1.png").unlink()
    (folder / "dev-7-2-img1.png").hardlink_to(folder / "dev-7-2-img0.png")
    _, report = check({"dev.json": NLVR2}, "--images", folder)
    message = "the pictures dev-7-2-img0.png and dev-7-2-img1.png are one file"
    assert listed(report) == [("dev.json", "line 3", "does not fit", message)]


def test_drawn_pictures_of_two_splits_are_not_guessed_between(check, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    (folder / "train-4-0-0.png").hardlink_to(folder / "dev-4-0-0.png")
    _, report = check({"dev.json": NLVR}, "--images", folder)
    assert report["reasons"] == {"does not fit": 1} and "end alike" in report["problems"][0]["message"]


def test_questions_are_held_against_the_annotations_that_share_most_with_them(check):
    fewer = {"annotations": changed(ANNOTATIONS, "annotations", 1, "image_id", to=7)["annotations"][:9]}
    other = {
        "data_subtype": "val2014",
        "questions": [{"question_id": 500, "image_id": 1, "question": "Of a test split?"}],
    }
    code, report = check({"q.json": QUESTIONS, "test.json": other, "a.json": fewer})
    assert (code, report["reasons"]) == (1, {"does not fit": 2})
    assert listed(report) == [
        ("a.json", "id 19", "does not fit", "is in q.json, not here"),
        ("a.json", "id 11", "does not fit", "is about 7 here, about 1 in q.json"),
    ]


def test_the_table(tmp_path, images, capsys):
    (tmp_path / "q.json").write_text(text(changed(QUESTIONS, "questions", 3, "image_id", to=77)))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(text(ANNOTATIONS).encode()))
    files = [str(tmp_path / name) for name in ("q.json", "a.json.gz")]
    assert commands.main(["check-data", *files, "--images", str(images)]) == 1
    out = capsys.readouterr().out.replace(f"{tmp_path}/", "").replace(f"{images}/", "").splitlines()
    assert [" ".join(line.split()) for line in out] == [
        "a.json.gz id 13 does not fit is about 2 here, about 77 in q.json",
        "q.json questions[3] missing image COCO_val2014_000000000077.jpg: No such file or directory",
        "q.json vqa-questions 10 entries, 6 pictures",
        "a.json.gz vqa-annotations 10 entries, 0 pictures",
        "2 annotation files, 2 problems; 1 does not fit; 1 missing image",
    ]
    assert commands.main(["check-data", files[1]]) == 0
    assert "1 annotation files, 0 problems" in capsys.readouterr().out
    assert commands.main(["check-data", files[0]]) == 0
    assert "pictures not checked (no --images)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["none.json"], "none.json: no such file (name an annotation file)"),
        (["a.json", "--images", "nowhere"], "nowhere: No such file or directory (name a folder of pictures)"),
    ],
)
def test_mistakes_in_the_call_are_one_line(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text(text(QUESTIONS))
    assert commands.main(["check-data", *options]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_control_characters_are_shown_as_text(tmp_path, capsys):
    (tmp_path / "a.json").write_text(text(changed(QUESTIONS, "questions", 2, "image_id", to="\x1b[31m")))
    assert commands.main(["check-data", str(tmp_path / "a.json")]) == 1
    assert "\x1b" not in capsys.readouterr().out


READERS = {
    "vqa-questions": lambda path, folders: read_questions(path, None, folders),
    "vqa-annotations": lambda path, folders: read_annotations(path, LEARNT) and [],
    "nlvr2": read_statements,
    "nlvr": read_statements,
    "coco-captions": read_captions,
    "karpathy": read_captions,
    "flickr8k": read_captions,
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), name=st.sampled_from(sorted(FILES)), as_text=st.booleans())
def test_what_is_passed_is_read_and_what_is_read_is_passed(tmp_path, capsys, images, seed, name, as_text):
    """The command and the tasks never disagree about a file, whatever was done to it."""
    rng, path = random.Random(seed), tmp_path / "a.json"
    whole = as_text or isinstance(FILES[name], str)
    path.write_text(mutate_text(text(FILES[name]), rng) if whole else text(mutate(FILES[name], rng)), newline="")
    kind = "nlvr" if name == "nlvr2" else name
    capsys.readouterr()
    code = commands.main(["check-data", "--json", "--kind", kind, str(path), "--images", str(images)])
    report = json.loads(capsys.readouterr().out)
    try:
        missing = missing_pictures(READERS[name](path, PictureFolders([images])))
    except DataError as error:
        assert code == 1 and str(error).isprintable()
        assert all(p["reason"] and p["message"].isprintable() for p in report["problems"])
        return
    assert report["reasons"] == ({"missing image": len(missing)} if missing else {})
    assert code == (1 if missing else 0)
