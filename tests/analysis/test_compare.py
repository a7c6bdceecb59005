"""The comparison table and a run's summary, with numbers worked by hand."""

from __future__ import annotations

import json
import math

from mhmoe_vl.analysis.compare import comparison_table
from mhmoe_vl.analysis.summary import summarize, table

TERMS = ("images", "texts", "pairs_image", "pairs_text")


def line(variant, seed, perplexity, **summary):
    count = {
        "ffn": {"kind": "moe", "num_experts": 16, "hidden_dim": 384, "top_k": 2},
        "parameters": {"total": 30e6, "active": 24e6},
        "flops": {"pair": 0.8e9},
    }
    scores = {f"perplexity/{term}/after": perplexity for term in TERMS} | {"perplexity/after": perplexity}
    return {
        "variant": variant,
        "seed": seed,
        "seconds": 120,
        "count": count,
        "summary": scores | {"step_seconds": 0.5} | summary,
    }


def test_table_pairs_runs_by_seed():
    ledger = [
        line("fine", 0, 100.0, expert_share_min=0.01, expert_share_max=0.2, dead_experts=0),
        line("fine", 1, 200.0, expert_share_min=0.02, expert_share_max=0.1, dead_experts=1),
        line("mh", 1, 200.0 * math.e, expert_share_min=0.1, expert_share_max=0.2),
        line("mh", 0, 100.0, expert_share_min=0.1, expert_share_max=0.3),
        line("dense", 0, 50.0),
    ]
    tables = [
        {cells[0]: cells[1:] for cells in ([c.strip() for c in row.split("|")[1:-1]] for row in text.splitlines())}
        for text in comparison_table(ledger, "fine").split("\n\n")
    ]
    scores, differences = tables
    assert scores["fine"][:4] == ["moe 16x384 k2", "30.00", "24.00", "0.800"]
    assert scores["fine"][4:9] == ["150 ± 71"] * 5
    assert scores["fine"][9:] == ["1.0% / 20.0%", "1", "0.50"]
    assert scores["dense"][9] == "-"
    assert {len(row) for row in scores.values()} == {12}
    # Differences 0 and 1: mean 0.5, standard error sqrt(0.5) / sqrt(2) = 0.5.
    assert differences["mh"] == ["+0.500 ± 0.500"] * 5 + ["0 1"]
    assert differences["fine"] == ["0"] * 5 + ["0 1"]
    assert differences["dense"] == [f"{math.log(0.5):+.3f}"] * 5 + ["0"]


def test_summary_reads_first_and_last_scores_and_the_last_load(tmp_path):
    lines = [
        {"step": 0, "split": "val", "perplexity/texts": 50.0},
        {"step": 1, "split": "train", "loss": 3.0, "step_seconds": 1.0, "memory_mb": 10} | {"load/a": [0.5, 0.5]},
        {"step": 2, "split": "train", "loss": 2.0, "step_seconds": 3.0, "memory_mb": 30} | {"load/a": [1.0, 0.0]},
        {"step": 2, "split": "val", "perplexity/texts": 20.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    (tmp_path / "baselines.json").write_text('{"perplexity/texts": 30.0}')
    summary = summarize(tmp_path)
    assert summary == {
        "steps": 2,
        "step_seconds": 2.0,
        "peak_memory_mb": 30,
        "expert_share_min": 0.0,
        "expert_share_max": 1.0,
        "dead_experts": 0,
        "perplexity/texts/before": 50.0,
        "perplexity/texts/after": 20.0,
        "perplexity/texts/baseline": 30.0,
    }
    shown = table(summary, tmp_path / "report.html").splitlines()
    [scores] = [row for row in shown if row.startswith("perplexity/texts")]
    assert scores.split() == ["perplexity/texts", "50", "20", "30"]
