"""The table that a training tool ends with, from what the run folder holds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..errors import one_line
from .run_log import RunLog, read_metrics

RATES = ("images_per_s", "samples_per_s", "step_seconds")
TERMS = ("images", "texts", "pairs_image", "pairs_text")
MIN_NAME, MAX_NAME, MAX_SCORES = 28, 40, 30


def summarize(run_dir: Path) -> dict[str, float]:
    """Key numbers of a run: one flat mapping, scores as ``<name>/before``, ``/after`` and ``/baseline``.

    Rates are medians over the logged steps; expert shares are those of the last logged step.
    """
    log = read_metrics(run_dir / "metrics.jsonl")
    summary: dict[str, float] = {}
    if "loss" in log.train:
        summary["steps"] = log.train["loss"].steps[-1]
    summary |= {name: statistics.median(log.train[name].values) for name in RATES if name in log.train}
    if "memory_mb" in log.train:
        summary["peak_memory_mb"] = max(log.train["memory_mb"].values)
    return summary | _expert_load(log) | _scores(log, run_dir / "baselines.json")


def _expert_load(log: RunLog) -> dict[str, float]:
    shares = [share for pool in log.pools.values() for share in pool.load[-1].tolist()]
    if not shares:
        return {}
    dead = sum(series.values[-1] for name, series in log.train.items() if name.startswith("dead/"))
    return {"expert_share_min": min(shares), "expert_share_max": max(shares), "dead_experts": dead}


def _scores(log: RunLog, baselines_file: Path) -> dict[str, float]:
    baselines = json.loads(baselines_file.read_text()) if baselines_file.is_file() else {}
    scores = {}
    for name, series in sorted(log.val.items()):
        scores |= {f"{name}/before": series.values[0], f"{name}/after": series.values[-1]}
        if name in baselines:
            scores[f"{name}/baseline"] = baselines[name]
    return scores


def shortfalls(summary: dict[str, float]) -> list[str]:
    """What a pre-training run has not learnt: one text for each of the four perplexities that falls short.

    Each must end below half of its value before training, and below the perplexity without a model (of the shares of
    the targets alone); one that is missing falls short too.
    """
    found = []
    for name in (f"perplexity/{term}" for term in TERMS):
        before, after, baseline = (summary.get(f"{name}/{when}", math.nan) for when in ("before", "after", "baseline"))
        if not (after < before / 2 and after < baseline):
            found.append(f"{name} {after:.4g} (first {before:.4g}, no model {baseline:.4g})")
    return found


def table(summary: dict[str, float], report: Path) -> str:
    """The summary as text, up to 30 scores in columns, with the place of the run folder and its report."""
    scores = [name.removesuffix("/after") for name in summary if name.endswith("/after")]
    first = sorted(scores, key=lambda name: name.count("/"))[:MAX_SCORES]  # parts are left out before their sum is
    shown = [name for name in scores if name in first]
    plain = {name: value for name, value in summary.items() if "/" not in name}
    width = max([MIN_NAME, *(len(_name(name)) for name in [*plain, *shown])])
    lines = [f"{_name(name):{width}} {_number(value)}" for name, value in plain.items()]
    if scores:
        lines.append("\n" + _row("validation", ["first", "last", "no model"], width))
        for name in shown:
            cells = [_number(summary.get(f"{name}/{when}")) for when in ("before", "after", "baseline")]
            lines.append(_row(name, cells, width))
    if len(scores) > len(shown):
        lines.append(f"... and {len(scores) - len(shown)} more in {report.name}")
    return "\n".join([*lines, f"\nrun folder  {report.parent}", f"report      {report}"])


def _row(name: str, cells: Sequence[str], width: int) -> str:
    return " ".join([f"{_name(name):{width}}", *(f"{cell:>12}" for cell in cells)]).rstrip()


def _name(name: str) -> str:
    """``name`` with its middle left out where it is long: its parts differ at the end."""
    shown = one_line(name)
    return shown if len(shown) <= MAX_NAME else f"{shown[:18]}...{shown[-(MAX_NAME - 21) :]}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
