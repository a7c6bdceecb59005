"""The table that a training tool ends with, from what the run folder holds."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; a last line cut by a crash is left out."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def summarize(run_dir: Path) -> dict[str, float]:
    """Key numbers of a run: one flat mapping, scores as ``<name>/before``, ``/after`` and ``/baseline``."""
    metrics = read_metrics(run_dir)
    train = [line for line in metrics if line["split"] == "train"]
    val = [line for line in metrics if line["split"] == "val"]
    summary: dict[str, float] = {"steps": max(line["step"] for line in metrics)}
    for name in ("images_per_s", "samples_per_s", "step_seconds"):
        values = [line[name] for line in train if name in line]
        if values:
            summary[name] = statistics.median(values)
    if train:
        summary["peak_memory_mb"] = max(line.get("memory_mb", 0.0) for line in train)
        summary |= _expert_load(train[-1])
    if val:
        baselines = {}
        if (run_dir / "baselines.json").is_file():
            baselines = json.loads((run_dir / "baselines.json").read_text())
        for name in val[-1].keys() - {"step", "split", "time"}:
            summary[f"{name}/before"], summary[f"{name}/after"] = val[0].get(name), val[-1][name]
            if name in baselines:
                summary[f"{name}/baseline"] = baselines[name]
    return dict(sorted(summary.items(), key=lambda item: ("/" in item[0], item[0])))


def _expert_load(line: dict[str, Any]) -> dict[str, float]:
    shares = [share for name, load in line.items() if name.startswith("load/") for share in load]
    if not shares:
        return {}
    dead = sum(value for name, value in line.items() if name.startswith("dead/"))
    return {"expert_share_min": min(shares), "expert_share_max": max(shares), "dead_experts": dead}


def table(summary: dict[str, float], report: Path) -> str:
    """The summary as text, scores in columns, with the place of the run folder and its report."""
    scores = sorted({name.rsplit("/", 1)[0] for name in summary if name.endswith("/after")})
    lines = [f"{name:28} {_number(value)}" for name, value in summary.items() if "/" not in name]
    if scores:
        lines.append(f"\n{'validation':28} {'step 0':>12} {'end':>12} {'no model':>12}")
        for name in scores:
            cells = [_number(summary.get(f"{name}/{when}")) for when in ("before", "after", "baseline")]
            lines.append(f"{name:28} " + " ".join(f"{cell:>12}" for cell in cells))
    return "\n".join([*lines, f"\nrun folder  {report.parent}", f"report      {report}"])


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
