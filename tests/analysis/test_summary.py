"""What a run must have learnt, and the ledger of a comparison, judged."""

from __future__ import annotations

import json

import pytest

from mhmoe_vl.analysis.compare import read_ledger
from mhmoe_vl.analysis.summary import TERMS, shortfalls
from mhmoe_vl.errors import DataError


def scores(after: float, before: float = 100.0, baseline: float = 60.0) -> dict[str, float]:
    values = {"before": before, "after": after, "baseline": baseline}
    return {f"perplexity/{term}/{when}": value for term in TERMS for when, value in values.items()}


def test_four_perplexities_below_both_marks_are_enough():
    assert shortfalls(scores(49.9)) == []
    assert shortfalls(scores(49.9) | {"perplexity/after": 1e9, "accuracy/images/after": 0.0}) == []


@pytest.mark.parametrize(
    "values",
    [
        {"perplexity/texts/after": 50.0},
        {"perplexity/texts/after": float("nan")},
        {"perplexity/texts/baseline": 40.0},
        {"perplexity/texts/before": 80.0},
    ],
)
def test_one_that_falls_short_is_named(values):
    [text] = shortfalls(scores(40.0) | values)
    assert text.startswith("perplexity/texts ")


def test_the_text_holds_the_three_numbers():
    values = scores(40.0) | {"perplexity/texts/after": 70.5}
    assert shortfalls(values) == ["perplexity/texts 70.5 (first 100, no model 60)"]


def test_scores_that_are_missing_fall_short():
    assert [text.split()[0] for text in shortfalls({})] == [f"perplexity/{term}" for term in TERMS]


LINE = {
    "variant": "dense",
    "seed": 0,
    "command": "python",
    "count": {"ffn": {"kind": "dense", "hidden_dim": 8}, "parameters": {"total": 1, "active": 1}, "flops": {"pair": 1}},
    "summary": {"step_seconds": 1.0, "perplexity/after": 2.0} | {f"perplexity/{term}/after": 2.0 for term in TERMS},
}


def test_a_ledger_is_read_whole(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(LINE)}\n" * 2)
    assert read_ledger(tmp_path / "a.jsonl") == [LINE, LINE]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"garbage", "a.jsonl:2: not a line"),
        (b"5", "a.jsonl:2: not a line"),
        (b"[" * 100_000, "a.jsonl:2: not a line"),
        (json.dumps({k: v for k, v in LINE.items() if k != "command"}).encode(), "a.jsonl:2: not a line"),
        (json.dumps(LINE | {"seed": "0"}).encode(), "a.jsonl:2: not a line"),
        (json.dumps(LINE | {"summary": {}}).encode(), "a.jsonl:2: not a line"),
        (json.dumps(LINE | {"count": "x"}).encode(), "a.jsonl:2: not a line"),
        (b"\xff", "a.jsonl: not UTF-8"),
    ],
)
def test_what_is_no_ledger_is_refused(tmp_path, text, words):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(LINE).encode() + b"\n" + text)
    with pytest.raises(DataError, match=words):
        read_ledger(tmp_path / "a.jsonl")
