"""Figures of training runs, from their logs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config import read_yaml
from ..data.writing import write_files
from ..errors import ConfigError, DataError
from .plotting import COLORS, MARKERS, drawn, panels, png, shown
from .run_log import RunLog, read_metrics
from .trained import told_apart


class LoggedRun(NamedTuple):
    """A run's log with what its configuration says of the layer under study.

    Attributes:
        name: of the run folder.
        log: its ``metrics.jsonl``.
        layer: what runs that differ in experts only have in common: ``dense``, ``moe``, ``moe cosine``, ``mh_moe h4``.
        num_experts: none for a dense model.
    """

    name: str
    log: RunLog
    layer: str
    num_experts: int | None

    def last(self, metric: str) -> float:
        """The last finite value of a validation number.

        Raises:
            DataError: there is none.
        """
        series = self.log.val.get(metric)
        values = [value for value in series.values if math.isfinite(value)] if series else []
        if not values:
            found = ", ".join(sorted(self.log.val)) or "none"
            raise DataError(f"{self.name}: no validation number {metric!r} in its metrics.jsonl (there are: {found})")
        return values[-1]


def read_run(folder: str | Path) -> LoggedRun:
    """The log of a run folder.

    Raises:
        DataError: ``metrics.jsonl`` or ``config.yaml`` is missing, or the configuration has no encoder.
    """
    folder = Path(folder)
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: missing (name the folder of a training run)")
    encoder = read_yaml(folder / "config.yaml").get("encoder")
    ffn = encoder.get("ffn") if isinstance(encoder, dict) else None
    if not isinstance(ffn, dict) or "kind" not in ffn:
        raise DataError(f"{folder / 'config.yaml'}: encoder.ffn is not set (name a run that trained an encoder)")
    router = ffn.get("router") if isinstance(ffn.get("router"), dict) else {}
    words = [str(ffn["kind"])] + (["cosine"] if router.get("kind") == "cosine" else [])
    words += [f"h{ffn['num_subtokens']}"] if "num_subtokens" in ffn else []
    words += [f"top-{ffn['top_k']}"] if "top_k" in ffn else []
    experts = ffn.get("num_experts")
    experts = experts if isinstance(experts, int) else None
    return LoggedRun(folder.resolve().name, read_metrics(folder / "metrics.jsonl"), " ".join(words), experts)


@drawn
def perplexity_curves(runs: Sequence[LoggedRun], metric: str = "perplexity") -> Any:
    """A validation number of several runs over the training steps (paper 1, figure 4), logarithmic.

    Args:
        runs: from :func:`read_run`.
        metric: key of the validation log, such as ``perplexity/images``.

    Raises:
        DataError: a run does not have it.
    """
    if not runs:
        raise ConfigError("perplexity_curves: no run to draw (name one)")
    figure, [ax] = panels(1, 6.4, 3.8)
    for number, run in enumerate(runs):
        run.last(metric)
        series = run.log.val[metric]
        style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number // len(COLORS) % len(MARKERS)]}
        line = ("-", "--", ":")[number % 3]
        label = f"{shown(run.name)} ({shown(run.layer)}): {run.last(metric):.4g}"
        ax.plot(series.steps, series.values, linestyle=line, markersize=3.5, label=label, **style)
    ax.set_yscale("log")
    ax.set_xlabel("training step")
    ax.set_ylabel(f"validation {shown(metric)}")
    ax.grid(alpha=0.25, which="both")
    ax.legend(fontsize=8, title="run (layer): last value")
    return figure


@drawn
def perplexity_by_experts(runs: Sequence[LoggedRun], metric: str = "perplexity") -> Any:
    """The last value of a validation number against the number of experts, a line per kind of layer (paper 1, figure
    7a). Runs of the same layer and number of experts are averaged, their smallest and largest value shown as a bar;
    dense runs are a level line.

    Raises:
        DataError: a run does not have the number.
        ConfigError: no run has experts.
    """
    points = expert_points(runs, metric)
    if not any(experts for by_experts in points.values() for experts in by_experts):
        raise ConfigError("perplexity_by_experts: no run with experts (name runs with ffn.kind moe or mh_moe)")
    figure, [ax] = panels(1, 5.4, 3.6)
    for number, (layer, by_experts) in enumerate(points.items()):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        if 0 in by_experts:
            mean = statistics.mean(by_experts[0])
            ax.axhline(mean, color=color, linestyle="--", label=f"{shown(layer)}: {mean:.4g}")
            continue
        places, values = list(by_experts), list(by_experts.values())
        means = [statistics.mean(v) for v in values]
        ends = [[m - min(v) for m, v in zip(means, values, strict=True)]]
        ends += [[max(v) - m for m, v in zip(means, values, strict=True)]]
        ax.errorbar(places, means, yerr=ends, color=color, marker=marker, capsize=3, label=shown(layer))
    places = sorted({experts for by_experts in points.values() for experts in by_experts if experts})
    ax.set_xscale("log", base=2)
    ax.set_xticks(places, map(str, places))
    ax.minorticks_off()
    ax.set_xlabel("experts")
    ax.set_ylabel(f"validation {shown(metric)}, last")
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8)
    return figure


def expert_points(runs: Sequence[LoggedRun], metric: str) -> Mapping[str, Mapping[int, list[float]]]:
    """Last values of a number by layer, and in a layer by number of experts (0 for none), rising."""
    points: dict[str, dict[int, list[float]]] = {}
    for run in sorted(runs, key=lambda run: (run.layer, run.num_experts or 0)):
        points.setdefault(run.layer, {}).setdefault(run.num_experts or 0, []).append(run.last(metric))
    return points


def plot_runs(runs: Sequence[str], metric: str, out: Path) -> int:
    """What tools/plot_runs.py does: ``perplexity.png``, and where runs have experts ``perplexity_by_experts.png``.

    Args:
        runs: run folders.
        metric: see :func:`perplexity_curves`.
        out: folder to write into.

    Returns:
        The exit code, 0.
    """
    logged = told_apart([read_run(run) for run in runs])
    files = {"perplexity.png": png(perplexity_curves(logged, metric))}
    if any(run.num_experts for run in logged):
        files["perplexity_by_experts.png"] = png(perplexity_by_experts(logged, metric))
    for path in write_files(out, files):
        print(path)
    return 0
