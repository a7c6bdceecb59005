"""``report.html``: a training run on one page that opens from disk, without a server, scripts or network."""

from __future__ import annotations

import json
import math
import os
import reprlib
import statistics
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from ..config import read_yaml
from ..errors import DataError, one_line
from .charts import MAX_CURVES, Chart, PoolChart, Series, Table, line_chart, number, pool_chart
from .gallery import read_gallery
from .run_log import Pool, RunLog, read_metrics

TITLES = {
    "loss": "Training loss",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "balance_loss": "Balance loss (1 is even)",
    "z_loss": "Router z-loss",
    "entropy": "Router entropy (nats)",
    "dead": "Experts without rows",
    "dropped": "Choices dropped by capacity",
    "images_per_s": "Images per second",
    "samples_per_s": "Samples per second",
    "step_seconds": "Seconds per step",
    "memory_mb": "Memory (MB)",
}
EXPERTS = ("balance_loss", "z_loss", "entropy", "dead", "dropped")
SKIPPED = ("bad", "skipped")
SPEED = ("images_per_s", "samples_per_s", "step_seconds", "memory_mb")
SMOOTHED = ("loss", "grad_norm", "balance_loss", "z_loss", "entropy", "images_per_s", "samples_per_s", "step_seconds")
SCORES = {"before": "step 0", "after": "end", "baseline": "no model"}
MAX_RECORDS, MAX_KEYS, MAX_LIST_BYTES = 12, 16, 32_000_000


def write_report(run_dir: str | Path, *, metric: str | None = None, higher_is_better: bool = False) -> Path:
    """Write ``report.html`` into a run folder, from its ``config.yaml`` and ``metrics.jsonl``.

    Also shown, where present: ``summary.json`` (a flat mapping, as a table on top), ``predictions/`` (file names and
    a few records) and ``gallery.json`` (see :mod:`.gallery`). The same folder always gives the same bytes. Values
    under ``a/b`` share the figure of ``a``; ``bad/<reason>`` and ``skipped`` count from the start of the run.

    Args:
        run_dir: the run folder.
        metric: validation number to show on top; none means the first without a ``/`` in its name.
        higher_is_better: direction of ``metric``.

    Returns:
        Path of the page.

    Raises:
        DataError: the configuration or the log is missing, or another file is not in its format.
        ConfigError: ``config.yaml`` is not readable.
    """
    run_dir = Path(run_dir)
    for name in ("config.yaml", "metrics.jsonl"):
        if not (run_dir / name).is_file():
            raise DataError(f"{run_dir / name}: missing (name the folder of a training run)")
    config = read_yaml(run_dir / "config.yaml")
    log = read_metrics(run_dir / "metrics.jsonl")
    skipped = {key: series for key, series in log.train.items() if _group(key) in SKIPPED}
    curves = {key: series for key, series in log.train.items() if key not in skipped}
    pools = [_pool_chart(name, pool) for name, pool in log.pools.items()]
    cards, num_cards = read_gallery(run_dir)
    page = template("report.html").render(
        run=run_dir.resolve().name,
        task=_section(config, "task").get("kind", ""),
        unreadable=log.unreadable,
        tiles=_tiles(log, config, pools, metric, higher_is_better),
        summary=_summary(run_dir / "summary.json"),
        val_table=_range_table(log.val),
        val_charts=_charts(log.val),
        train_charts=_charts(curves, leave_out=EXPERTS + SPEED),
        expert_charts=_charts(curves, only=EXPERTS),
        speed_charts=_charts(curves, only=SPEED),
        pools=pools,
        skipped=_skipped_table(skipped),
        cards=cards,
        num_cards=num_cards,
        predictions=_predictions(run_dir / "predictions"),
        config=(run_dir / "config.yaml").read_text(encoding="utf-8"),
    )
    path, part = run_dir / "report.html", run_dir / "report.html.part"
    part.write_text(page, encoding="utf-8")
    os.replace(part, path)
    return path


# ------------------------------------------------------------------------------------------- figures
def _group(key: str) -> str:
    return key.partition("/")[0]


def _charts(columns: Mapping[str, Series], only: tuple[str, ...] = (), leave_out: tuple[str, ...] = ()) -> list[Chart]:
    """One chart per group of keys, in the order of the log; groups above eight lines go over several charts."""
    groups: dict[str, dict[str, Series]] = {}
    for key, series in columns.items():
        group = _group(key)
        if (not only or group in only) and group not in leave_out:
            groups.setdefault(group, {})[key.removeprefix(f"{group}/")] = series
    charts = []
    for group, members in groups.items():
        names = sorted(members, key=lambda name: name != group)  # the group's own value first, the rest as logged
        parts = [names[i : i + MAX_CURVES] for i in range(0, len(names), MAX_CURVES)]
        for i, part in enumerate(parts, 1):
            title = TITLES.get(group, _title(group))
            title += f" ({i} of {len(parts)})" if len(parts) > 1 else ""
            log, smoothed = "perplexity" in group or group == "grad_norm", group in SMOOTHED
            charts.append(line_chart(title, {n: members[n] for n in part}, main=group, log=log, smoothed=smoothed))
    return charts


def _title(group: str) -> str:
    """``codebook_usage`` as a title; names with capitals of their own, as CIDEr, keep them."""
    words = group.replace("_", " ")
    return words.capitalize() if words.islower() else words


def _pool_chart(name: str, pool: Pool) -> PoolChart:
    by_stream = np.stack(pool.by_stream) if len(pool.by_stream) == len(pool.load) else None
    return pool_chart(name, pool.steps, np.stack(pool.load), by_stream)


def _finite(series: Series | None) -> list[tuple[int, float]]:
    return [(s, v) for s, v in zip(series.steps, series.values, strict=True) if math.isfinite(v)] if series else []


def _range_table(columns: Mapping[str, Series]) -> Table:
    """First, last, lowest and highest value of every number, with the steps."""
    rows = []
    for key, series in columns.items():
        pairs = _finite(series)
        if pairs:
            (low_step, low), (high_step, high) = min(pairs, key=lambda p: p[1]), max(pairs, key=lambda p: p[1])
            ends = [number(series.values[0]), number(series.values[-1])]
            rows.append([key, *ends, f"{number(low)} (step {low_step:,})", f"{number(high)} (step {high_step:,})"])
    return Table(["", "first", "last", "lowest", "highest"], rows, "")


def _skipped_table(columns: Mapping[str, Series]) -> Table:
    """Counters of what training left out that are not zero: where they first rose, and their last value."""
    rows = []
    for key, series in columns.items():
        above = [(step, value) for step, value in _finite(series) if value]
        if above:
            rows.append([key.removeprefix("bad/"), f"{above[0][0]:,}", number(above[-1][1])])
    return Table(["what", "first at step", "count"], rows, "")


# --------------------------------------------------------------------------------------- key numbers
def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _tiles(
    log: RunLog, config: Mapping[str, Any], pools: list[PoolChart], metric: str | None, higher_is_better: bool
) -> list[tuple[str, str, str]]:
    """The numbers on top of the page: (name, value, remark)."""
    steps = max((s.steps[-1] for s in [*log.train.values(), *log.val.values()]), default=0)
    planned = _section(config, "train").get("steps")
    tiles = [("steps", f"{steps:,}", f"of {planned:,}" if isinstance(planned, int) else "")]
    metric = metric or next((key for key in log.val if "/" not in key), "")
    if pairs := _finite(log.val.get(metric)):
        step, best = (max if higher_is_better else min)(pairs, key=lambda pair: pair[1])
        word = "highest" if higher_is_better else "lowest"
        tiles.append((metric, number(log.val[metric].values[-1], 4), f"{word} {number(best, 4)} at step {step:,}"))
    if pairs := _finite(log.train.get("loss")):
        tiles.append(("training loss", number(pairs[-1][1], 4), f"from {number(pairs[0][1], 4)}"))
    speed = "images_per_s" if _finite(log.train.get("images_per_s")) else "samples_per_s"
    if pairs := _finite(log.train.get(speed)):
        tiles.append((TITLES[speed].lower(), number(statistics.median(float(v) for _, v in pairs), 4), "median"))
    if pairs := _finite(log.train.get("memory_mb")):
        peak = max(value for _, value in pairs)
        tiles.append(("memory", f"{peak / 1024:.1f} GB" if peak >= 1024 else f"{peak:.0f} MB", "highest"))
    if log.times:
        first, last = min(log.times), max(log.times)
        tiles.append(("duration", _duration((last - first).total_seconds()), f"since {first:%Y-%m-%d %H:%M}"))
    if pools:
        dead, experts = sum(len(pool.dead) for pool in pools), sum(len(pool.table.rows) for pool in pools)
        tiles.append(("dead experts", str(dead), f"of {experts:,} at the end"))
    return tiles


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


# ----------------------------------------------------------------------------------- optional files
def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON: {one_line(error, 120)} (mend or remove the file)") from error


def _summary(path: Path) -> list[Table]:
    """The values of ``summary.json`` by name; those named ``<score>/before``, ``/after``, ``/baseline`` in one row."""
    if not path.is_file():
        return []
    values = _read_json(path)
    if not isinstance(values, dict) or any(isinstance(value, dict | list) for value in values.values()):
        raise DataError(f"{path}: holds {type(values).__name__}, not names with one value each (write a flat mapping)")
    plain, scores = [], {}
    for name, value in values.items():
        score, _, when = name.rpartition("/")
        if score and when in SCORES:
            scores.setdefault(score, {})[when] = number(value)
        else:
            plain.append([name, number(value)])
    rows = [[score, *(found.get(when, "") for when in SCORES)] for score, found in scores.items()]
    return [t for t in (Table([], plain, ""), Table(["score", *SCORES.values()], rows, "")) if t.rows]


class _Short(reprlib.Repr):
    """Values as Python writes them, long texts, long lists and deep nesting cut."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict, self.maxstring, self.maxother = 3, 3, 4, 60, 60

    def repr_float(self, value: float, level: int) -> str:
        return number(value, 4)


def _predictions(folder: Path) -> dict[str, Any]:
    """Names and sizes of the prediction files, and the first records of the last one as pairs of key and value."""
    files = sorted(path for path in folder.glob("**/*.json*") if path.is_file())
    records = _records(files[-1]) if files else []
    sizes = [[path.relative_to(folder).as_posix(), f"{path.stat().st_size:,} bytes"] for path in files]
    return {"files": Table([], sizes, ""), "records": [_pairs(record) for record in records]}


def _pairs(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    short = _Short()
    pairs = [(one_line(key, 40), one_line(short.repr(value), 160)) for key, value in islice(record.items(), MAX_KEYS)]
    return pairs + [("...", f"and {len(record) - MAX_KEYS} more")] * (len(record) > MAX_KEYS)


def _records(path: Path) -> list[dict[str, Any]]:
    """The first objects of a JSON list or of JSON lines; none where the file is another thing or a very long list."""
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                found = [json.loads(line) for line in islice(file, MAX_RECORDS)]
        else:
            found = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= MAX_LIST_BYTES else []
    except (ValueError, RecursionError):
        return []
    return [record for record in found[:MAX_RECORDS] if isinstance(record, dict)] if isinstance(found, list) else []


# ---------------------------------------------------------------------------------------------- page
def visible(value: object) -> object:
    """What the template prints: text with control characters (line ends aside) shown as ``\\x1b``, numbers in short."""
    if isinstance(value, float):
        return number(value)
    if not isinstance(value, str) or isinstance(value, Markup):  # Markup is what the template's own macros return
        return value
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in value)


def template(name: str) -> jinja2.Template:
    """A page beside this module; whatever it prints is escaped, control characters shown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
