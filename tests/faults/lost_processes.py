"""Promise 9: a worker or rank that dies, hangs or leaves ends the job at once and by name; odd batches do not."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from tiny_world import settings, write_settings

from mhmoe_vl import distributed
from mhmoe_vl.data import loader
from mhmoe_vl.errors import DataError
from mhmoe_vl.train.step import Trainer

from .harness import ROOT, Found, environment, error_line, fork, in_ranks, kill, start_ranks, wait
from .runs import losses, pretrain, world, write_run

TITLE = "workers and ranks"
AT, STEPS = 5, 8
LIMIT, TIMEOUT = 30.0, 6.0
"""seconds to the end of a job after a death, and the timeout that a hang runs into, plus 10"""


def check(folder: Path, full: bool) -> Found:
    found = Found("")
    world(folder)
    slowest = {"death": 0.0, "hang": 0.0}
    workers = [_worker(folder, how, found, slowest) for how in (WORKER_FAULTS if full else ["killed"])]
    cases = [(how, rank) for how in RANK_FAULTS for rank in (1, 0)] if full else [("killed", 1), ("hangs", 1)]
    ranks = [_rank(folder, how, rank, found, slowest) for how, rank in cases]
    command = _torchrun(folder, found, slowest) if full else 0
    for kind, limit in (("death", LIMIT), ("hang", TIMEOUT + 10)):
        if full and slowest[kind] > limit:
            _fail(found, kind, f"over after {slowest[kind]:.0f} s")
    batches = [_batches(folder, name, ranks, found) for name in BATCHES for ranks in ((1, 2) if full else (1,))]
    found.figure = (
        f"{sum(workers)} of {len(workers)} lost workers and {sum(ranks) + command} of {len(ranks) + full} lost ranks:"
        f" named, over in {slowest['death']:.0f} s (a hang {slowest['hang']:.0f} s with a timeout of {TIMEOUT:.0f} s),"
        f" resumed; {sum(batches)} of {len(batches)} runs with odd batches finite"
    )
    found.numbers = {"workers": sum(workers), "ranks": sum(ranks), "batches": sum(batches), **slowest}
    return found


def _fail(found: Found, name: str, what: str) -> bool:
    found.failures.append(f"{name}: {what}")
    return False


def _note_time(how: str, seconds: float, slowest: dict[str, float]) -> None:
    kind = "hang" if how == "hangs" else "death"
    slowest[kind] = max(slowest[kind], seconds)


# --------------------------------------------------------------------------------------------- workers
WORKER_FAULTS: dict[str, Callable[[], None]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda: time.sleep(1000),
    "exits": lambda: os._exit(3),
}


def _worker(folder: Path, how: str, found: Found, slowest: dict[str, float]) -> bool:
    name = f"worker-{how}"
    file = write_run(folder, name, num_workers=2, steps=STEPS, save_every=1)
    began = folder / f"{name}.began"

    def run() -> int:
        original, trainer = loader.StepDataset.__getitem__, os.getpid()

        def read(dataset: loader.StepDataset, step: int):
            if step == AT and os.getpid() != trainer:
                began.write_text(str(time.time()))
                WORKER_FAULTS[how]()
            return original(dataset, step)

        loader.StepDataset.__getitem__, loader.WORKER_TIMEOUT = read, TIMEOUT
        return pretrain("--config", file)

    code = wait(fork(run, folder / f"{name}.txt"), 120)
    seconds = time.time() - float(began.read_text()) if began.exists() else math.inf
    said = (folder / f"{name}.txt").read_text()
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if code != 2 or error_line("\n".join(errors)) or "data worker" not in errors[0] or "Traceback" in said:
        return _fail(found, name, f"exit code {code}: {said[-400:]}")
    _note_time(how, seconds, slowest)
    return _resumes(folder, name, 1, found)


# ----------------------------------------------------------------------------------------------- ranks
def _raise() -> None:
    raise DataError("a.tar: gone (fetch it again)")


RANK_FAULTS: dict[str, Callable[[], None]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda: time.sleep(1000),
    "exits with 0": lambda: os._exit(0),
    "fails": _raise,
}


def _faulty(file: Path, how: str, me: bool, began: Path) -> int:
    """A run in which this rank, if it is the one, comes to grief at step ``AT``."""
    update = Trainer.update

    def watched(trainer: Trainer, step: int, *arguments, **options):
        if step == AT and me:
            began.write_text(str(time.time()))
            RANK_FAULTS[how]()
        return update(trainer, step, *arguments, **options)

    Trainer.update = watched
    distributed.TIMEOUT = timedelta(seconds=TIMEOUT if how == "hangs" else 120)
    return pretrain("--config", file)


def _rank(folder: Path, how: str, lost: int, found: Found, slowest: dict[str, float]) -> bool:
    name = f"rank-{lost}-{how.replace(' ', '-')}"
    file = write_run(folder, name, steps=STEPS, save_every=1)
    began, said = folder / f"{name}.began", folder / f"{name}-said"
    children = start_ranks(lambda rank: _faulty(file, how, rank == lost, began), 2, said)
    code = wait(children[1 - lost], 120)
    seconds = time.time() - float(began.read_text()) if began.exists() else math.inf
    if how == "hangs":  # torchrun would do so
        kill(children[lost])
    else:
        wait(children[lost], 30)
    text = (said / f"rank-{1 - lost}.txt").read_text()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if code != 2 or error_line("\n".join(errors)) or f"rank {lost}" not in errors[0] or "Traceback" in text:
        return _fail(found, name, f"exit code {code}: {text[-500:]}")
    if how == "fails" and "a.tar: gone" not in errors[0]:
        return _fail(found, name, f"the cause is not told: {errors}")
    _note_time(how, seconds, slowest)
    return _resumes(folder, name, 2, found)


def _torchrun(folder: Path, found: Found, slowest: dict[str, float]) -> bool:
    """The real command: a killed rank ends the job, and torchrun names it."""
    file = write_run(folder, "torchrun", steps=5000, eval_every=0, save_every=5)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(ROOT / "tools/pretrain.py"), "--config", str(file)]
    with (folder / "torchrun.txt").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=output, text=True)
        log = folder / "torchrun" / "metrics.jsonl"
        until = time.monotonic() + 240
        while time.monotonic() < until and not (log.exists() and len(log.read_text().splitlines()) > 8):
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [child for child in children if b"pretrain.py" in Path(f"/proc/{child}/cmdline").read_bytes()]
        began = time.monotonic()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        code = process.wait(120)
    said = (folder / "torchrun.txt").read_text()
    if code != 1 or "exitcode  : -9" not in said or "rank      : 1" not in said:
        return _fail(found, "torchrun", f"exit code {code}: {said[-400:]}")
    _note_time("killed", time.monotonic() - began, slowest)
    return True


def _resumes(folder: Path, name: str, ranks: int, found: Found) -> bool:
    """Started again, the run ends as one that lost nobody."""
    whole = f"whole-{ranks}"
    for run in (whole, name):
        if run == whole and (folder / whole).exists():
            continue
        file = folder / f"{name}.yaml" if run == name else write_run(folder, whole, steps=STEPS, save_every=1)
        if ranks == 1:
            codes = [wait(fork(lambda file=file: pretrain("--config", file), folder / f"{run}-again.txt"), 120)]
        else:
            codes = in_ranks(lambda rank, file=file: pretrain("--config", file), ranks, folder / f"{run}-again")
        if codes != [0] * ranks:
            return _fail(found, name, f"{run} ends with {codes}")
    same = losses(folder / name) == losses(folder / whole)
    return same or _fail(found, name, "not the run that lost nobody")


# --------------------------------------------------------------------------------------------- batches
NO_VALIDATION = {stream: {"val": None} for stream in ("images", "texts", "pairs")}
BATCHES = {
    "images only": {"texts": None, "pairs": None},
    "texts only": {"images": None, "pairs": None},
    "one sample": {"images": None, "texts": None},
    "nothing masked": {"text_mask_ratio": 0.0, "pair_text_mask_ratio": 0.0, "image_mask_ratio": 0.0} | NO_VALIDATION,
    "everything masked": {"text_mask_ratio": 1.0, "pair_text_mask_ratio": 1.0, "image_mask_ratio": 1.0} | NO_VALIDATION,
}


def _batches(folder: Path, name: str, ranks: int, found: Found) -> bool:
    run = f"{name.replace(' ', '-')}-{ranks}"
    values = settings(world(folder), folder / run, task=BATCHES[name], train={"steps": 2, "eval_every": 0})
    if name == "one sample":
        values["task"]["pairs"]["batch_size"] = ranks
    file = write_settings(folder / f"{run}.yaml", values)
    codes = in_ranks(lambda rank: pretrain("--config", file), ranks, folder / f"{run}-said")
    if codes != [0] * ranks:
        return _fail(found, run, f"exit codes {codes}: {(folder / f'{run}-said/rank-0.txt').read_text()[-400:]}")
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    numbers = [value for line in lines for value in line.values() if isinstance(value, (float, type(None)))]
    return all(v is not None and math.isfinite(v) for v in numbers) or _fail(found, run, "a number is not finite")
