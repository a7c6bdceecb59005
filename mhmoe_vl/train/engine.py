"""The one loop: steps, evaluations, checkpoints, for any task. It knows tasks by the protocol only.

A run is a function of its configuration: step ``s`` takes the batches of step ``s``, the learning rate of step ``s``
and random numbers seeded by ``s``. A checkpoint is therefore weights, optimizer state and a few counters, and a
resumed run repeats the one that was never stopped, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import config as configuration
from .. import distributed
from ..config import RunConfig, TrainConfig
from ..data.loader import dead_workers_named, step_loader
from ..errors import ConfigError, TrainingError, one_line
from ..tasks.base import Batch, Record, Task
from . import checkpoint, optim, resume
from .alarms import CollapseAlarm, SpikeAlarm
from .evaluation import predict, predictions_path, write_predictions, write_texts
from .log import RunLog
from .step import Autocast, Trainer
from .system import StopSignals, lock, peak_memory_mb, raise_malloc_thresholds, seed_all

MAX_SKIPPED_IN_A_ROW = 10
MAX_FAILED_SAVES = 3
SHOWN = 3
"""names of what is not finite in a warning"""
BAD_WINDOW = 1000
"""samples of which ``max_bad_fraction`` may be bad before the run has seen as many"""


@contextlib.contextmanager
def session(config: TrainConfig) -> Iterator[torch.device]:
    """Set the process up for training: heap, threads, process group. Gives the device of this rank."""
    raise_malloc_thresholds()
    if config.threads:
        torch.set_num_threads(config.threads)
    device = distributed.select_device(config.device)
    distributed.init_process_group(device)
    try:
        with distributed.lost_ranks_named(), dead_workers_named():
            yield device
    finally:
        distributed.shutdown()


def fit(task: Task, model: nn.Module, config: RunConfig, run_dir: Path, *, device: torch.device) -> int:
    """Train ``model`` and leave everything in ``run_dir``; continue the run there if ``config.train.resume`` says so.

    Returns:
        0 when all steps are done, 128 + n when signal n stopped the run after a step; run again to go on.

    Raises:
        ConfigError, CheckpointError: the run in ``run_dir`` cannot be continued like this.
        TrainingError: too many bad samples, steps without finite gradient, or failed saves.
    """
    with contextlib.ExitStack() as stack:
        distributed.on_main(lambda: stack.enter_context(lock(run_dir)))
        signals = stack.enter_context(StopSignals())
        run = _Run(task, model, config, run_dir, device, signals)
        stack.callback(run.log.close)
        return run.finish()


def evaluate_checkpoint(
    task: Task, model: nn.Module, config: RunConfig, path: Path, *, split: str, device: torch.device
) -> tuple[list[Record], dict[str, float]]:
    """Predictions and scores of a checkpoint, or of the best (else newest) one of a run folder, on a split.

    Raises:
        CheckpointError: there is none, or it does not fit ``model``.
    """
    best = path / "checkpoints" / "best"
    found = checkpoint.share(lambda: resume.named(best if best.is_dir() else path, print))
    checkpoint.load_weights(model, found.weights, found.path)
    seed_all(config.seed)
    autocast = Autocast(config.train.precision, device)
    records = predict(task, model.to(device), task.dataset(split), device, autocast)
    return records, distributed.on_main(lambda: task.score(records))


@dataclass
class Progress:
    """The counters of a run, as saved in ``state.json``.

    Attributes:
        step: updates done, skipped ones included; the position in the data too.
        evaluated: step of the last evaluation, -1 while there was none.
        best: best value of the task's metric since training began, found at ``best_step``.
        skipped: updates left out because loss or gradient was not finite; ``skipped_in_a_row`` of them just now.
        samples: samples used, ``texts_cut`` of them with a text too long; ``bad`` counts those left out, by reason.
        last_used: by pool, the last logged step at which each expert was chosen.
    """

    step: int = 0
    evaluated: int = -1
    best: float | None = None
    best_step: int = -1
    skipped: int = 0
    skipped_in_a_row: int = 0
    samples: int = 0
    texts_cut: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    last_used: dict[str, list[int]] = field(default_factory=dict)


class _Clock:
    """Speed since the last log line, data loading included."""

    def __init__(self) -> None:
        self.seconds, self.steps, self.samples, self.images = 0.0, 0, 0, 0

    def add(self, seconds: float, samples: int, images: int) -> None:
        self.seconds += seconds
        self.steps += 1
        self.samples += samples
        self.images += images

    def values(self) -> dict[str, float]:
        values = {"samples_per_s": self.samples / self.seconds, "step_seconds": self.seconds / self.steps}
        return values | ({"images_per_s": self.images / self.seconds} if self.images else {})


class _Run:
    def __init__(
        self, task: Task, model: nn.Module, config: RunConfig, run_dir: Path, device: torch.device, signals: StopSignals
    ) -> None:
        self.task, self.config, self.run_dir, self.device, self.signals = task, config, run_dir, device, signals
        self.log = RunLog(run_dir, steps=config.train.steps, tensorboard=config.train.tensorboard)
        self.trainer = Trainer(task, model, config, device)
        self.progress = Progress()
        self.clock = _Clock()
        self.saved: tuple[int, int] | None = None
        self.failed_saves = 0
        self._begin()
        self.routing_alarm, self.loss_alarm = CollapseAlarm(self.progress.last_used), SpikeAlarm()
        self.trainer.distribute()

    def _begin(self) -> None:
        """Start anew or from a checkpoint, and cut the log back to that point."""
        settings = [{"settings": configuration.dump(self.config)}]
        if any(entry != settings[0] for entry in distributed.gather_records(settings)):
            raise ConfigError("ranks were started with different configurations (use one command line for all)")
        found = checkpoint.share(lambda: resume.starting_point(self.run_dir, self.config, self.log.say))
        goes_on = found is not None
        distributed.on_main(lambda: resume.keep_recorded(self.run_dir, self.task.recorded(), goes_on=goes_on))
        if goes_on:
            self._restore(found)
        place = (self.progress.step, self.progress.evaluated) if goes_on else (-1, -1)
        distributed.on_main(lambda: self._begin_files(*place))

    def _begin_files(self, step: int, evaluated: int) -> None:
        """Cut the log to what the run goes on from, and write its configuration."""
        self.log.cut(step, evaluated)
        resume.write_config(self.run_dir / "config.yaml", self.config)

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        trainer = self.trainer
        checkpoint.load_weights(trainer.model, found.tensors["model"], found.path)
        optim.load_optimizer_tensors(trainer.model, trainer.optimizer, found.tensors["optimizer"])
        if trainer.ema is not None:
            checkpoint.load_weights(trainer.ema.module, found.weights, found.path)
        known = {entry.name for entry in fields(Progress)}  # older checkpoints have fewer
        self.progress = Progress(**{name: value for name, value in found.state.items() if name in known})
        self.saved = (self.progress.step, self.progress.evaluated)
        if self.progress.step < self.config.train.steps:
            self.log.say(f"continues from {found.path}, step {self.progress.step}")

    # ------------------------------------------------------------------------------------------ loop
    def finish(self) -> int:
        """Do the steps that are left; the exit code."""
        train, progress = self.config.train, self.progress
        if progress.step >= train.steps and progress.evaluated == progress.step:
            self.log.say(f"finished: {progress.step} of {train.steps} steps are done in {self.run_dir}")
            return 0
        steps = iter(step_loader(self.task.dataset("train"), progress.step, train.steps, train.num_workers))
        validation = self.task.dataset("val")
        self.log.start(progress.step)
        while True:
            stop = distributed.max_over_ranks(self.signals.received)
            if stop:
                return self._stop(stop)
            if self._evaluation_due():
                self._evaluate(validation)
                continue
            if self._save_due():
                self._save()
            if progress.step >= train.steps:
                return 0
            self._step(steps)

    def _step(self, steps: Iterator[list[Batch]]) -> None:
        began, progress = time.perf_counter(), self.progress
        parts = next(steps)
        counts = self.trainer.count(parts)
        progress.samples += sum(counts.samples)
        progress.texts_cut += counts.texts_cut
        if counts.bad:
            self._note_bad(sum((Counter(part.bad) for part in parts), Counter()))
        logged = (progress.step + 1) % self.config.train.log_every == 0 or progress.step + 1 == self.config.train.steps
        seed_all(self.config.seed, progress.step, distributed.rank())
        with self._memory_named(counts.samples):
            done = self.trainer.update(progress.step, parts, counts, logged=logged)
        progress.step += 1
        self._note_skipped(done.not_finite)
        self.clock.add(time.perf_counter() - began, sum(counts.samples), counts.images)
        self.log.advance()
        if logged:
            values = done.values | self.clock.values() | {"memory_mb": peak_memory_mb(self.device)}
            values |= {"skipped": progress.skipped} | {f"bad/{reason}": n for reason, n in progress.bad.items()}
            if progress.texts_cut:
                values["texts_cut"] = progress.texts_cut
            collapsed, alarms = self.routing_alarm.check(progress.step, values)
            values |= {"collapsed": collapsed} if progress.last_used else {}
            for alarm in filter(None, [*alarms, self.loss_alarm.check(values["loss"])]):
                self.log.say(f"warning: step {progress.step}: {alarm}")
            self.log.write(progress.step, "train", values)
            self.clock = _Clock()

    @contextlib.contextmanager
    def _memory_named(self, samples: list[int]) -> Iterator[None]:
        """Turns the failure to get memory, for which torch has no one type, into a line."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            named = ("out of memory", "allocate memory", "enough memory")
            if isinstance(error, RuntimeError) and not any(words in str(error) for words in named):
                raise
            peak = peak_memory_mb(self.device)
            raise TrainingError(
                f"{self.run_dir}: out of memory in step {self.progress.step + 1}, parts of {samples} samples over all"
                f" ranks, {peak:,.0f} MiB at most so far (lower batch_size or raise train.accumulate; the last"
                " checkpoint stands)"
            ) from error

    def _stop(self, number: int) -> int:
        if self.saved != (self.progress.step, self.progress.evaluated):
            self._save()
        name = signal.Signals(number).name
        self.log.say(f"stopped by {name} after step {self.progress.step} (run the same command to go on)")
        return 128 + number

    def _evaluation_due(self) -> bool:
        step, train = self.progress.step, self.config.train
        due = step in (0, train.steps) or (train.eval_every and step % train.eval_every == 0)
        return bool(due) and self.progress.evaluated != step

    def _save_due(self) -> bool:
        step, train = self.progress.step, self.config.train
        due = step in (train.steps, self.progress.best_step)
        due = due or (step and train.save_every and step % train.save_every == 0)
        return bool(due) and self.saved != (step, self.progress.evaluated)

    # ---------------------------------------------------------------------------------------- guards
    def _note_bad(self, mine: Counter[str]) -> None:
        """Add all ranks' bad samples to the ledger.

        Raises:
            TrainingError: there are too many.
        """
        ledger = Counter(self.progress.bad)
        for counts in distributed.gather_records([dict(mine)]):
            ledger.update(counts)
        self.progress.bad = dict(ledger)
        bad, limit = ledger.total(), self.config.train.max_bad_fraction
        seen = self.progress.samples + bad
        if bad > limit * max(seen, BAD_WINDOW):
            reasons = ", ".join(f"{n} {one_line(reason, 40)}" for reason, n in ledger.most_common(3))
            raise TrainingError(
                f"training data: {bad} of {seen} samples are bad, over train.max_bad_fraction {limit:g}: {reasons}"
                " (mend the data or raise the limit; the last checkpoint stands)"
            )

    def _note_skipped(self, not_finite: list[str]) -> None:
        """Count updates that were left out, and say why.

        Raises:
            TrainingError: too many in a row.
        """
        progress = self.progress
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if not_finite else 0
        if not not_finite:
            return
        progress.skipped += 1
        more = f" and {len(not_finite) - SHOWN} more" if len(not_finite) > SHOWN else ""
        what = f"not finite: {', '.join(not_finite[:SHOWN])}{more}"
        self.log.say(one_line(f"warning: step {progress.step} skipped: {what}"))
        if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"{self.run_dir}: {MAX_SKIPPED_IN_A_ROW} steps in a row without a finite loss and gradient, the last is"
                f" {progress.step}, {one_line(what, 120)} (lower optim.lr; the last checkpoint stands)"
            )

    # -------------------------------------------------------------------------- evaluations and saves
    def _evaluate(self, validation: Any) -> None:
        """Score the weights (their moving average, if kept); a stop signal leaves it undone."""
        progress, task, trainer = self.progress, self.task, self.trainer
        model = trainer.model if trainer.ema is None else trainer.ema.module
        seed_all(self.config.seed)
        records = predict(task, model, validation, self.device, trainer.autocast, lambda: bool(self.signals.received))
        if distributed.max_over_ranks(self.signals.received):
            return
        scores = distributed.on_main(lambda: task.score(records))
        progress.evaluated, score = progress.step, scores.get(task.metric, math.nan)
        sign = 1 if task.higher_is_better else -1
        better = math.isfinite(score) and (progress.best is None or sign * score > sign * progress.best)
        if progress.step and better:
            progress.best, progress.best_step = score, progress.step
        if distributed.is_main():
            self._write_predictions(records)
        self.log.write(progress.step, "val", scores)

    def _write_predictions(self, records: list[Record]) -> None:
        """A full disk costs the predictions of one evaluation, not the run."""
        path, best = predictions_path(self.run_dir, self.progress.step), self.progress.best_step
        try:
            write_predictions(path, records, keep=[predictions_path(self.run_dir, best)])
            if best in (-1, self.progress.step):
                write_texts(path.parent, self.task.submission(records))
        except OSError as error:
            self.log.say(
                f"warning: {path.parent}: {one_line(error.strerror or error)} (predictions are lost, training goes on)"
            )

    def _save(self) -> None:
        """Write a checkpoint; a full disk is survived until the next one, but not three times or at the end."""
        problem = distributed.on_main(self._save_on_main)
        self.failed_saves = self.failed_saves + 1 if problem else 0
        if problem and (self.failed_saves == MAX_FAILED_SAVES or self.progress.step >= self.config.train.steps):
            raise TrainingError(f"{self.run_dir}/checkpoints: {problem} (make room; the last checkpoint stands)")
        if problem:
            self.log.say(f"warning: {self.run_dir}/checkpoints: {problem} (the checkpoint before stands)")
        self.saved = (self.progress.step, self.progress.evaluated)

    def _save_on_main(self) -> str | None:
        """What went wrong, if anything."""
        trainer, progress = self.trainer, self.progress
        parts = {
            "model": trainer.model.state_dict(),
            "optimizer": optim.optimizer_tensors(trainer.model, trainer.optimizer),
        }
        if trainer.ema is not None:
            parts["ema"] = trainer.ema.module.state_dict()
        state = {**asdict(progress), "seed": self.config.seed, "world_size": distributed.world_size()}
        try:
            last = checkpoint.save(self.run_dir / "checkpoints", parts, state, configuration.dump(self.config))
            if progress.step == progress.best_step:
                checkpoint.link(last, "best")
            if self.config.train.keep_steps:
                checkpoint.link(last, f"step-{progress.step:08d}")
        except OSError as error:
            return one_line(error.strerror or error)
        return None
