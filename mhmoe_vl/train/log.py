"""What a run tells: ``metrics.jsonl`` (the source of every table and figure), the console, TensorBoard on request."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import distributed
from ..errors import ConfigError, one_line

SHOWN = ("loss", "lr", "grad_norm", "images_per_s", "samples_per_s", "memory_mb", "skipped")
"""numbers of a training line that the console shows"""


class RunLog:
    """Writes a run's lines. Rank 0 alone writes and speaks; a full disk or a closed console never stops training.

    Args:
        run_dir: gets ``metrics.jsonl``, one JSON object a line: ``step``, ``split``, ``time`` and numbers.
        steps: last step of the run.
        tensorboard: write the numbers as TensorBoard events too.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
    """

    def __init__(self, run_dir: Path, *, steps: int, tensorboard: bool) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.steps = steps
        self.active = distributed.is_main()
        self._bar: tqdm | None = None
        self._warned = False
        self._events = _event_writer(run_dir) if tensorboard and self.active else None

    def start(self, step: int) -> None:
        """Show progress from ``step`` on: a bar on a terminal, lines otherwise.

        The file is there from now on: a run may be stopped before its first line, and its report reads it.
        """
        if self.active:
            try:
                self.path.touch()
            except OSError as error:
                self._warn(error)
        if self.active and sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(total=self.steps, initial=step, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """One step more."""
        if self._bar is not None:
            self._bar.update()

    def say(self, text: str) -> None:
        """A line on the console."""
        if self.active:
            with contextlib.suppress(OSError, ValueError):
                print(text, flush=True) if self._bar is None else self._bar.write(text)

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """A line of numbers: in full precision to the file (NaN and infinity as null), in short to the console."""
        if not self.active:
            return
        line = {"step": step, "split": split, "time": datetime.now(UTC).isoformat(timespec="seconds"), **values}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({key: _finite(value) for key, value in line.items()}, allow_nan=False) + "\n")
        except OSError as error:
            self._warn(error)
        names = SHOWN if split == "train" else values
        shown = [f"{name} {values[name]:.4g}" for name in names if isinstance(values.get(name), (int, float))]
        self.say(f"{split} step {step}/{self.steps}  " + "  ".join(shown))
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._events.add_scalar(f"{split}/{name}", value, step)

    def cut(self, step: int, evaluated: int) -> None:
        """Drop lines of training after ``step`` and of evaluations after step ``evaluated``.

        A resumed run writes them again. A last line that a crash left unfinished goes too.
        """
        if not self.active or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                if line.endswith("\n") and entry["step"] <= (evaluated if entry["split"] == "val" else step):
                    kept.append(line)
        part = self.path.with_suffix(".part")
        part.write_text("".join(kept), encoding="utf-8")
        os.replace(part, self.path)

    def close(self) -> None:
        """End the bar and flush the events."""
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            self._events.close()

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self.say(f"warning: {self.path}: {one_line(error.strerror)} (training goes on, lines are lost)")
        self._warned = True


def _event_writer(run_dir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("train.tensorboard: TensorBoard is not installed (pip install 'mhmoe-vl[track]')") from error
    return SummaryWriter(str(run_dir / "tensorboard"))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [_finite(v) for v in value] if isinstance(value, list) else value


class RoutingTotals:
    """Sums ``RoutingStats`` over the parts and ranks of one step, pool by pool."""

    def __init__(self) -> None:
        self._loads: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, stats: Mapping[str, Any]) -> None:
        """Add the statistics of one part, by name of the pool."""
        for name, pool in stats.items():
            rows = pool.num_rows.double()
            entropy = torch.where(rows > 0, pool.entropy.double() * rows, 0.0)
            sums = torch.stack([entropy, pool.dropped.double(), rows])
            self._loads[name] = self._loads.get(name, 0) + pool.load.double()
            self._sums[name] = self._sums.get(name, 0) + sums

    def values(self) -> dict[str, Any]:
        """Numbers of a training line, over all ranks.

        Per pool: ``load`` (each expert's share of all choices), ``load_by_stream`` (the same within each stream),
        ``entropy`` of the router (nats, mean over rows), ``dead`` (experts nobody chose), ``dropped`` (share of
        choices lost to capacity).
        """
        values: dict[str, Any] = {}
        for name, load in self._loads.items():
            load = distributed.all_reduce_sum(load)
            entropy, dropped, rows = distributed.all_reduce_sum(self._sums[name]).tolist()
            experts, choices = load.sum(0), max(1.0, float(load.sum()))
            values[f"load/{name}"] = (experts / choices).tolist()
            values[f"load_by_stream/{name}"] = (load / load.sum(1, keepdim=True).clamp_min(1)).tolist()
            values[f"entropy/{name}"] = entropy / max(1.0, rows)
            values[f"dead/{name}"] = int((experts == 0).sum())
            values[f"dropped/{name}"] = dropped / choices
        return values
