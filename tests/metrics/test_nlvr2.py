"""NLVR2's accuracy and consistency, by hand and against the label counts of the real sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mhmoe_vl.errors import DataError
from mhmoe_vl.metrics.coverage import coverage_problems
from mhmoe_vl.metrics.nlvr2 import score_nlvr2, sentence_key, to_csv


@pytest.mark.parametrize(
    ("split", "accuracy", "all_true"), [("dev", 0.5086, (78, 2018)), ("test1", 0.5107, (84, 1995))]
)
def test_always_true_on_the_real_sets(data_dir: Path, split: str, accuracy: float, all_true: tuple[int, int]) -> None:
    """``all_true``: sentences whose labels are all True, counted apart from the code, of all sentences."""
    lines = (data_dir / "nlvr2" / "data" / f"{split}.json").read_text().splitlines()
    labels = {example["identifier"]: example["label"] == "True" for example in map(json.loads, lines)}
    scores = score_nlvr2(dict.fromkeys(labels, True), labels)
    assert round(scores["accuracy"], 4) == accuracy
    assert scores["consistency"] == pytest.approx(all_true[0] / all_true[1], abs=1e-12)


def test_a_sentence_is_consistent_when_right_for_all_of_its_pairs() -> None:
    """Three sentences: dev-1-0 (three pairs, one wrong), dev-1-1 (one pair, right), dev-2-0 (two pairs, right)."""
    labels = dict.fromkeys(["dev-1-0-0", "dev-1-1-0", "dev-1-2-0", "dev-1-0-1", "dev-2-0-0", "dev-2-3-0"], True)
    labels["dev-2-3-0"] = False
    predictions = labels | {"dev-1-2-0": False}
    assert score_nlvr2(predictions, labels) == pytest.approx({"accuracy": 5 / 6, "consistency": 2 / 3})
    assert score_nlvr2(labels, labels) == {"accuracy": 1.0, "consistency": 1.0}
    opposite = {identifier: not label for identifier, label in labels.items()}
    assert score_nlvr2(opposite, labels) == {"accuracy": 0.0, "consistency": 0.0}


@pytest.mark.parametrize(
    ("identifier", "key"),
    [("dev-850-0-1", "dev-850-1"), ("test1-0-3-0", "test1-0-0"), ("train-12-11-2", "train-12-2"), ("1572-0", "1572")]
    + [(bad, None) for bad in ("", "dev", "dev-850", "dev-850-0", "dev-850-0-1-2", "dev-850-0-1.png", "dev-850--1")],
)
def test_sentence_of_an_identifier(identifier: str, key: str | None) -> None:
    assert sentence_key(identifier) == key


def test_a_submission_has_a_line_for_each_example() -> None:
    assert to_csv({"test1-0-0-0": True, "test1-0-1-0": False}) == "test1-0-0-0,True\ntest1-0-1-0,False\n"


def test_only_whole_splits_are_scored() -> None:
    with pytest.raises(DataError, match=r"^1 of 2 examples missing: dev-1-1-0 "):
        score_nlvr2({"dev-1-0-0": True}, {"dev-1-0-0": True, "dev-1-1-0": True})
    with pytest.raises(DataError, match=r"^1 examples not in the split: dev-1-1-0 "):
        score_nlvr2({"dev-1-0-0": True, "dev-1-1-0": True}, {"dev-1-0-0": True})
    with pytest.raises(DataError, match="no example to score"):
        score_nlvr2({}, {})


def test_coverage_counts_what_is_missing_extra_and_double() -> None:
    assert coverage_problems([1, 2, 3], [3, 2, 1], "question") == []
    assert coverage_problems([1, 1, 9, 9, 9, 2], range(8), "question") == [
        "6 of 8 questions missing: 0, 3, 4, ... (predict the whole split)",
        "1 questions not in the split: 9 (leave them out)",
        "2 questions given twice or more: 1, 9 (keep one prediction each)",
    ]
