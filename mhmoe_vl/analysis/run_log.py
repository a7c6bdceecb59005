"""``metrics.jsonl`` read for drawing: one series per number, one load table per pool of experts."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from .charts import Series


@dataclass
class Pool:
    """Expert load of one pool: per logged line the step, (E,) shares, and (2, E) shares of image and text or none."""

    steps: list[int] = field(default_factory=list)
    load: list[np.ndarray] = field(default_factory=list)
    by_stream: list[np.ndarray] = field(default_factory=list)


@dataclass
class RunLog:
    """What ``metrics.jsonl`` says: one series per number, one pool per ``load/<name>``, unreadable line numbers."""

    train: dict[str, Series] = field(default_factory=dict)
    val: dict[str, Series] = field(default_factory=dict)
    pools: dict[str, Pool] = field(default_factory=dict)
    times: list[datetime] = field(default_factory=list)
    unreadable: list[int] = field(default_factory=list)


def read_metrics(path: Path) -> RunLog:
    """The numbers of ``metrics.jsonl``.

    A line that is cut or damaged is left out and noted. A line whose step is not above the one before it in its split
    stems from a resumed run: it replaces what was logged from that step on.
    """
    log, last = RunLog(), {"train": -1, "val": -1}
    with path.open(encoding="utf-8", errors="backslashreplace") as file:
        for line_number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                step, split = row.pop("step"), row.pop("split")
                if type(step) is not int or not 0 <= step < 10**15 or split not in last:
                    raise ValueError
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                log.unreadable.append(line_number)
                continue
            if step <= last[split]:
                _rewind(log, split, step)
            last[split] = step
            _add(log, split, step, row)
    return log


def _rewind(log: RunLog, split: str, step: int) -> None:
    columns = log.train if split == "train" else log.val
    for key, series in list(columns.items()):
        keep = bisect_left(series.steps, step)
        del series.steps[keep:], series.values[keep:]
        if not keep:
            del columns[key]
    for name, pool in list(log.pools.items() if split == "train" else ()):
        keep = bisect_left(pool.steps, step)
        del pool.steps[keep:], pool.load[keep:], pool.by_stream[keep:]
        if not keep:
            del log.pools[name]


def _add(log: RunLog, split: str, step: int, row: dict[str, Any]) -> None:
    columns = log.train if split == "train" else log.val
    for key, value in row.items():
        if key == "time":
            log.times += _time(value)
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            series = columns.setdefault(key, Series())
            series.steps.append(step)
            series.values.append(_value(value))
        elif key.startswith("load/") and (load := _shares(value, 1)) is not None:
            pool = log.pools.setdefault(key.removeprefix("load/"), Pool())
            if not pool.load or pool.load[0].shape == load.shape:
                pool.steps.append(step)
                pool.load.append(load)
                streams = _shares(row.get(f"load_by_stream/{key.removeprefix('load/')}"), 2)
                if streams is not None and streams.shape == (2, len(load)):
                    pool.by_stream.append(streams)


def _value(value: float | None) -> float | int:
    """Numbers as logged; nothing, and absurdly long whole numbers, as a gap."""
    if isinstance(value, int):
        return value if abs(value) < 10**15 else math.nan
    return math.nan if value is None else value


def _shares(value: object, dimensions: int) -> np.ndarray | None:
    """Nested lists as an array of shares; none when they are no such thing."""
    try:
        array = np.asarray(value, dtype=np.float32)
    except (ValueError, TypeError, OverflowError):
        return None
    return array if array.ndim == dimensions and array.size and np.isfinite(array).all() and array.min() >= 0 else None


def _time(value: object) -> list[datetime]:
    try:
        time = datetime.fromisoformat(value)
    except (ValueError, TypeError):
        return []
    return [time if time.tzinfo else time.replace(tzinfo=UTC)]
