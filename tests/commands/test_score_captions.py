"""``mhmoe-vl score captions``: known scores from files, ``--check``, and files that are not what they should be."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mhmoe_vl.commands import score_captions
from mhmoe_vl.errors import guard
from mhmoe_vl.metrics import caption_reference

Score = Callable[..., int]
SPLIT = {
    "images": [{"id": 1}, {"id": 2}, {"id": 5}],
    "annotations": [
        {"id": 10, "image_id": 1, "caption": "A black dog is running."},
        {"id": 11, "image_id": 2, "caption": "Two cats can't sleep."},
        {"id": 12, "image_id": 5, "caption": "A red bus."},
        {"id": 13, "image_id": 1, "caption": "The dog runs (fast)."},
    ],
}
GOOD = [
    {"image_id": 5, "caption": "a red bus"},
    {"image_id": 1, "caption": "a black dog is running"},
    {"image_id": 2, "caption": "two cats can't sleep"},
]


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    score_captions.add_arguments(parser)
    parsed = parser.parse_args([str(argument) for argument in arguments])
    return guard(lambda: score_captions.run(parsed))


@pytest.fixture
def score(tmp_path: Path) -> Score:
    """Writes the two files and runs the command on them; texts are written as they are."""

    def write(name: str, value: Any) -> Path:
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))
        return tmp_path / name

    def call(predictions: Any, annotations: Any = SPLIT, *options: object) -> int:
        files = write("p.json", predictions), write("a.json", annotations)
        return run("--predictions", files[0], "--annotations", files[1], *options)

    return call


def test_the_table_and_the_file(score: Score, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(GOOD, SPLIT, "--json", tmp_path / "out.json", "--check") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found) == [*score_captions.METRICS, "images", "references", "tokenizer"]
    assert (found["Bleu_1"], found["ROUGE_L"]) == (pytest.approx(1), pytest.approx(1))
    assert (found["METEOR"], found["images"], found["references"], found["tokenizer"]) == (None, 3, 4, "own")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("p.json: 3 predictions, one for each of the split")
    assert lines[1].split() == ["Bleu_1", "1.000000"]
    assert lines[5].startswith("METEOR    not computed (needs Java and --tokenizer ptb; pip install")
    assert lines[7].split() == ["CIDEr", f"{found['CIDEr']:.6f}"]
    assert lines[8] == "3 images, 4 references, tokenizer: own (reads as PTBTokenizer 3.4.1)"


def test_a_known_score_from_files(data_dir: Path, tmp_path: Path) -> None:
    known = data_dir / "coco_captions_val2017" / "known_scores"
    split = json.loads((known / "leave_one_out_split.json").read_text())
    data = json.loads((known.parent / "captions_val2017.json").read_text())
    images, left_out = set(split["image_ids"]), set(split["excluded_annotation_ids"])
    data["images"] = [image for image in data["images"] if image["id"] in images]
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] in images and a["id"] not in left_out]
    (tmp_path / "a.json").write_text(json.dumps(data))
    files = ["--predictions", known / "leave_one_out_results.json", "--annotations", tmp_path / "a.json"]
    assert run(*files, "--json", tmp_path / "out.json") == 0
    found, expected = (json.loads(path.read_text()) for path in (tmp_path / "out.json", known / "expected.json"))
    for name in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"):
        assert found[name] == pytest.approx(expected[name], abs=1e-9), name


def test_check_lists_each_kind_of_mistake_once(score: Score, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [
        {"image_id": 1, "caption": "a"},
        {"image_id": "2", "caption": "b"},
        {"image_id": 5},
        {"image_id": 7, "caption": "c"},
        {"image_id": 1, "caption": "d"},
        {"image_id": 8, "caption": "e"},
    ]
    assert score(wrong, SPLIT, "--check") == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    lines = [line.partition("p.json: ")[2] for line in streams.err.splitlines()]
    assert lines == [
        '2 values missing or of a wrong type, first [1].image_id: need a whole number, got "2" '
        '(write [{"image_id": 1, "caption": "a cat"}, ...])',
        "1 of 3 images missing: 2 (predict the whole split)",
        "2 images not in the split: 7, 8 (leave them out)",
        "1 images given twice or more: 1 (keep one prediction each)",
    ]


def test_nothing_is_scored_on_fewer_images(score: Score, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(GOOD[:2], SPLIT, "--json", tmp_path / "out.json") == 2
    assert capsys.readouterr().err.endswith("p.json: 1 of 3 images missing: 2 (predict the whole split)\n")
    assert not (tmp_path / "out.json").exists()


def test_a_test_split_can_be_checked_but_not_scored(score: Score, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(GOOD, {"images": SPLIT["images"]}, "--check") == 0
    assert "nothing to score" in capsys.readouterr().out
    assert score(GOOD[1:], {"images": SPLIT["images"]}, "--check") == 2
    assert score(GOOD, {"images": SPLIT["images"]}) == 2
    assert "3 of 3 images without caption, first image 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("predictions", "what"),
    [
        ("", "p.json: "),
        ('[{"image_id": 1', "p.json: line 1"),
        ('[{"image_id": NaN, "caption": "a"}]', "p.json: line 1"),
        ('[{"image_id": 1, "image_id": 2, "caption": "a"}]', 'key "image_id" stands twice'),
        ({"1": "a"}, "p.json: 1 values missing or of a wrong type, first need a list, got an object of 1"),
        ([1, *GOOD], "p.json: 1 values missing or of a wrong type, first [0]: need an object, got 1"),
        ([{"image_id": True, "caption": "a"}, *GOOD], "of a wrong type, first [0].image_id: need a whole number"),
        ([{"image_id": 1.0, "caption": "a"}, *GOOD], "of a wrong type, first [0].image_id: need a whole number"),
        ([*GOOD[:2], {"image_id": 2, "caption": None}], "of a wrong type, first [2].caption: need a text, got null"),
        ([*GOOD, GOOD[0]], "p.json: 1 images given twice or more: 5 (keep one prediction each)"),
    ],
)
def test_bad_predictions_are_one_line(
    score: Score, predictions: Any, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(predictions) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert what in err


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"images": None}, "images: need a list, got null"),
        ({"images": []}, "images: need at least 1, got none"),
        ({"images": [{"id": 1}, {"id": 2}, {"id": 1}, {"id": 5}]}, "images[2].id: 1 stands already at [0]"),
        ({"annotations": [{"id": 1, "image_id": 1}]}, "annotations[0].caption: missing"),
        ({"annotations": [*SPLIT["annotations"], SPLIT["annotations"][0]]}, "annotations[4].id: 10 stands already"),
        ({"annotations": [{"id": 1, "image_id": 9, "caption": "a"}]}, "annotations[0].image_id: 9 is not in images"),
        ({"annotations": SPLIT["annotations"][:2]}, "1 of 3 images without caption, first image 5"),
    ],
)
def test_bad_annotations_are_one_line(
    score: Score, change: dict[str, Any], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(GOOD, SPLIT | change) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert f"a.json: {what}" in err or f"a.json: annotations: {what}" in err


def test_an_output_that_cannot_be_written_is_one_line(score: Score, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(GOOD, SPLIT, "--json", "/no/such/folder/out.json") == 2
    assert "/no/such/folder/out.json: cannot be written" in capsys.readouterr().err


def test_ptb_takes_the_tokens_and_meteor_of_java(
    score: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shout(captions: dict) -> dict:
        return {image: [text.split()[0].upper() for text in texts] for image, texts in captions.items()}

    monkeypatch.setattr(caption_reference, "check_reference", lambda: None)
    monkeypatch.setattr(caption_reference, "ptb_tokenize", shout)
    monkeypatch.setattr(caption_reference, "meteor", lambda references, candidates: float(candidates[5] == "A"))
    assert score(GOOD, SPLIT, "--tokenizer", "ptb", "--json", tmp_path / "out.json") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["METEOR"], found["tokenizer"], found["ROUGE_L"]) == (1.0, "ptb", pytest.approx(1))
    assert "tokenizer: Stanford PTBTokenizer (Java)" in capsys.readouterr().out


def test_ptb_without_the_extra_says_what_to_install(
    score: Score, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    assert score(GOOD, "no JSON, and not looked at", "--tokenizer", "ptb") == 2
    assert "pip install 'mhmoe-vl[caption-ref]'" in capsys.readouterr().err
