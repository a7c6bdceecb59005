"""Promise 1: killed at any moment, a run goes on and is bit for bit the run that was never killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from safetensors.torch import load_file

from mhmoe_vl.train import checkpoint, engine
from mhmoe_vl.train.step import Trainer

from .harness import CRASHED, ROOT, Found, Phase, environment, fork, kill, wait
from .runs import losses, pretrain, write_run

TITLE = "kill -9 and signals"
STARTING, IN_LOOP, SAVING, EVALUATING, FIRST_STEP = range(5)
NAMES = {
    STARTING: "start or report",
    IN_LOOP: "a step",
    SAVING: "a save",
    EVALUATING: "an evaluation",
    FIRST_STEP: "step 1",
}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LIMIT = 10.0
"""seconds from a signal to the end of the process"""


def check(folder: Path, full: bool) -> Found:
    kills, by_command, signals = (90, 10, 50) if full else (8, 1, 6)
    found = Found("")
    draw = random.Random(0)
    whole = write_run(folder, "whole")
    if wait(fork(lambda: pretrain("--config", whole), folder / "whole.txt"), 120) != 0:
        found.failures.append(f"the undisturbed run failed: {(folder / 'whole.txt').read_text()[-300:]}")
        return found
    moments = _killed_forked(folder, kills, draw, found)
    commands = _killed_commands(folder, by_command, draw, found)
    slowest = _signalled(folder, signals, draw, found)
    if full and slowest > LIMIT:
        found.failures.append(f"a signal took {slowest:.1f} s")
    places = ", ".join(f"{moments[number]} in {NAMES[number]}" for number in NAMES if moments[number])
    found.figure = (
        f"{kills + commands} of {kills + by_command} kills resumed, losses and weights bit-identical ({places};"
        f" {commands} through the command); {signals} signals: saved and out within {slowest:.1f} s"
    )
    found.numbers = {"kills": kills + commands, "moments": dict(moments), "signals": signals, "slowest_s": slowest}
    return found


def _same(folder: Path, name: str, reference: str) -> bool:
    """Whether two finished runs have the same log and the same last weights and optimizer state, to the bit."""
    if losses(folder / name) != losses(folder / reference):
        return False
    one, other = (sorted((folder / run / "checkpoints/last").glob("*.safetensors")) for run in (name, reference))
    pairs = [(load_file(a), load_file(b)) for a, b in zip(one, other, strict=True)]
    return all(a.keys() == b.keys() and all(bool((a[k] == b[k]).all()) for k in a) for a, b in pairs)


def _watched(file: Path, phase: Phase) -> int:
    """A run that shows its parent what it is doing."""
    phase.around(checkpoint, "save", SAVING)
    phase.around(checkpoint, "link", SAVING)
    phase.around(engine._Run, "_evaluate", EVALUATING)
    phase.around(engine._Run, "finish", IN_LOOP)
    update = Trainer.update

    def step(trainer: Trainer, number: int, *arguments, **options):
        with phase(FIRST_STEP if number == 0 else IN_LOOP):
            return update(trainer, number, *arguments, **options)

    Trainer.update = step
    return pretrain("--config", file)


def _killed_forked(folder: Path, kills: int, draw: random.Random, found: Found) -> Counter[int]:
    """Kill forked runs: a third at any time, the others inside a save, an evaluation, or the first step."""
    moments: Counter[int] = Counter()
    run, targets = 0, [None, SAVING, EVALUATING, FIRST_STEP, None, SAVING]
    while moments.total() < kills:
        name = f"killed-{run}"
        file = write_run(folder, name)
        while True:
            target = targets[moments.total() % len(targets)]
            if (folder / name / "metrics.jsonl").exists() and target == FIRST_STEP:
                target = None
            phase = Phase()
            output = folder / f"{name}.txt"
            child = fork(lambda file=file, phase=phase: _watched(file, phase), output)
            last = moments.total() >= kills
            code = wait(child, 120) if last else _kill_in_phase(child, phase, target, draw, moments)
            if code != -signal.SIGKILL:
                break
        if code != 0 or not _same(folder, name, "whole"):
            found.failures.append(f"run {name}: code {code}, or not the run never killed: {output.read_text()[-300:]}")
            if code == CRASHED or len(found.failures) > 3:
                break
        run += 1
    return moments


def _kill_in_phase(
    child: int, phase: Phase, target: int | None, draw: random.Random, moments: Counter[int]
) -> int | None:
    """Kill ``child`` a little after it enters ``target``, or at any time; its exit code if it was quicker."""
    until = time.monotonic() + (draw.uniform(0.02, 1.2) if target is None else 60)
    while time.monotonic() < until and (target is None or phase.now != target):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    if target is not None:
        time.sleep(draw.uniform(0, 0.02))
    seen = phase.now
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGKILL:
        moments[seen] += 1
    return code


def _killed_commands(folder: Path, count: int, draw: random.Random, found: Found) -> int:
    """Kill the real command after it has written some lines; the last start finishes. How many kills were survived."""
    if wait(fork(lambda: pretrain("--config", write_run(folder, "command-whole", images_only=False))), 300) != 0:
        found.failures.append("the undisturbed run of all streams failed")
    file = write_run(folder, "command", images_only=False)
    command = [sys.executable, str(ROOT / "tools/pretrain.py"), "--config", str(file)]
    log, survived = folder / "command" / "metrics.jsonl", 0
    for number in range(count + 1):
        with (folder / "command.txt").open("a") as said:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=said, stderr=said, start_new_session=True
            )
        if number == count:
            code = process.wait(300)
            break
        seen = log.stat().st_size if log.exists() else 0
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            if log.exists() and log.stat().st_size > seen:
                time.sleep(draw.uniform(0, 0.15))
                break
            time.sleep(0.01)
        kill(process.pid)
        process.poll()
        survived += 1
    if code != 0 or not _same(folder, "command", "command-whole"):
        found.failures.append(f"the command: code {code}: {(folder / 'command.txt').read_text()[-300:]}")
        return 0
    return survived


def _signalled(folder: Path, count: int, draw: random.Random, found: Found) -> float:
    """Signals at random moments of forked runs that save only when stopped; seconds that the slowest one took."""
    options = {"save_every": 0, "steps": 60, "eval_every": 10}
    wait(fork(lambda: pretrain("--config", write_run(folder, "long", **options))), 120)
    slowest, run, sent = 0.0, 0, 0
    while sent < count:
        name = f"signalled-{run}"
        file = write_run(folder, name, **options)
        while sent < count:
            phase, number = Phase(), SIGNALS[sent % 3]
            child = fork(lambda file=file, phase=phase: _watched(file, phase), folder / f"{name}.txt")
            code = _wait_for_loop(child, phase, draw.uniform(0, 0.4))
            if code is not None:
                break
            began = time.monotonic()
            os.kill(child, number)
            code = wait(child, 4 * LIMIT)
            slowest = max(slowest, time.monotonic() - began)
            if code in (0, -number) and _steps(folder / name) == options["steps"]:
                break  # it was over: nothing was left to save
            sent += 1
            trained = [line["step"] for line in losses(folder / name) if line["split"] == "train"]
            saved = _steps(folder / name)
            if code != 128 + number or saved != max(trained, default=0):
                said = (folder / f"{name}.txt").read_text()[-200:]
                found.failures.append(f"{name}: code {code}, saved step {saved}, trained {trained[-1:]}: {said}")
        if (wait(fork(lambda file=file: pretrain("--config", file)), 120), _same(folder, name, "long")) != (0, True):
            found.failures.append(f"{name}: not the run never stopped")
            return slowest
        run += 1
    return slowest


def _steps(run_dir: Path) -> int:
    """Steps of the run's last checkpoint."""
    return checkpoint.read(run_dir / "checkpoints/last").state["step"]


def _wait_for_loop(child: int, phase: Phase, more: float) -> int | None:
    """Wait until ``child`` trains, and ``more`` seconds; its exit code if it was quicker."""
    until = None
    while until is None or time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if until is None and phase.now != STARTING:
            until = time.monotonic() + more
        time.sleep(0.0005)
    return None
