"""What a run must have learnt, and the ledger of a comparison, judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mhmoe_vl.analysis.compare import read_ledger
from mhmoe_vl.analysis.summary import TERMS, shortfalls, table
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


TABLE = """\
steps                        12,000
step_seconds                 0.5

validation                          first         last     no model
Bleu_4                                  0       0.1871
CIDEr                                   0        1.213
accuracy                             0.25        71.23         23.4
accuracy/yes/no                        50          100         50.1
ceiling                              88.3          nan

run folder  out/vqa
report      out/vqa/report.html"""


def test_the_table_of_fine_tuning_scores():
    values = {
        "steps": 12_000, "step_seconds": 0.5, "Bleu_4/before": 0.0, "Bleu_4/after": 0.187105, "CIDEr/before": 0.0,
        "CIDEr/after": 1.21349, "accuracy/before": 0.25, "accuracy/after": 71.2345, "accuracy/baseline": 23.4,
        "accuracy/yes/no/before": 50.0, "accuracy/yes/no/after": 100.0, "accuracy/yes/no/baseline": 50.1,
        "ceiling/before": 88.3, "ceiling/after": float("nan"),
    }  # fmt: skip
    assert table(values, Path("out/vqa/report.html")) == TABLE


def test_long_names_and_large_numbers_keep_the_columns():
    names = [
        "accuracy/what color is the\x1b first thing on the left/0",
        "accuracy/what color is the first one on the left/1",
    ]
    values = {f"{name}/{when}": 1e30 for name in names for when in ("before", "after", "baseline")}
    rows = table(values, Path("report.html")).splitlines()[1:4]
    assert [len(row) for row in rows] == [40 + 3 * 13] * 3
    assert rows[1].startswith("accuracy/what colo...thing on the left/0 ")
    assert rows[2].startswith("accuracy/what colo...t one on the left/1 ")


def test_a_run_without_numbers_still_names_its_report():
    assert table({}, Path("run/report.html")) == "\nrun folder  run\nreport      run/report.html"


def test_at_most_30_scores_are_shown_parts_left_out_first():
    values = {f"accuracy/{i:03}/after": 1.0 for i in range(70)} | {"mean/after": 2.0}
    lines = table(values, Path("run/report.html")).splitlines()
    rows = [line for line in lines if line.startswith(("accuracy", "mean"))]
    assert len(rows) == 30 and rows[-1].split() == ["mean", "2"] and rows[-2].split()[0] == "accuracy/028"
    assert "... and 41 more in report.html" in lines


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
