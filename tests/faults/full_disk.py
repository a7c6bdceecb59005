"""Promise 7: a disk that is full, over quota or read-only, or a second job, never costs the previous checkpoint."""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mhmoe_vl.train import checkpoint
from mhmoe_vl.train.step import Trainer

from .harness import Found, error_line, fork, kill, wait
from .runs import losses, pretrain, world, write_run

TITLE = "full disk, quota, read-only, two jobs"
STEPS, AT = 12, 4
"""steps of a run, and how many are done when the fault comes"""
QUOTA = 20_000
"""most bytes of a file, far less than a checkpoint's"""


def _at_steps(**faults: Callable[[], None]) -> None:
    """Call ``faults`` (named ``step_N``) before those updates, in this process."""
    update = Trainer.update

    def watched(trainer: Trainer, step: int, *arguments, **options):
        faults.get(f"step_{step}", lambda: None)()
        return update(trainer, step, *arguments, **options)

    Trainer.update = watched


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@contextlib.contextmanager
def _small_disk(folder: Path, kilobytes: int) -> Iterator[bool]:
    """A file system of its own at ``folder``; gives False where this user may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def check(folder: Path, full: bool) -> Found:
    found = Found("")
    world(folder)
    write_run(folder, "whole", save_every=1, steps=STEPS)
    wait(fork(lambda: pretrain("--config", folder / "whole.yaml")), 300)
    counts = {_quota: 6, _quota_lifted: 4, _full: 4, _read_only: 3, _two_jobs: 3}
    kept = total = 0
    mounted = set()
    for case, count in counts.items():
        for number in range(count if full else 1):
            total += 1
            name = f"{case.__name__.strip('_')}-{number}"
            try:
                mounted.add(case(folder, name, AT + number))
                kept += 1
            except AssertionError as error:
                found.failures.append(f"{name}: {error}")
    disks = "" if True in mounted else " (quota alone: no right to mount a small disk)"
    found.figure = (
        f"{kept} of {total} times the previous checkpoint verifies and the run goes on or stops with one line:"
        f" quota, full disk, read-only, two jobs{disks}"
    )
    found.numbers = {"cases": total, "kept": kept}
    return found


def _holds(code: int | None, run: Path, said: str, before: int, *, stops: bool | None = None) -> None:
    """The run ended well or with one error line, and a checkpoint not older than ``before`` verifies."""
    assert code in ((0, 2) if stops is None else ((2,) if stops else (0,))), f"exit code {code}: {said[-300:]}"
    if code == 2:
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert error_line("\n".join(errors)) is None, f"error lines {errors}"
    assert "Traceback" not in said, said[-500:]
    step = checkpoint.newest(run / "checkpoints", lambda text: None).state["step"]
    assert step >= before, f"checkpoint of step {step}, {before} were saved"


def _said(file: Path, fault: Callable[[], None] | None = None) -> tuple[int | None, str]:
    output = file.with_suffix(".txt")

    def run() -> int:
        if fault is not None:
            fault()
        return pretrain("--config", file)

    output.unlink(missing_ok=True)
    return wait(fork(run, output), 120), output.read_text()


def _goes_on(file: Path, folder: Path, name: str) -> None:
    code, said = _said(file)
    assert code == 0 and losses(folder / name) == losses(folder / "whole"), f"not resumed: {code}: {said[-300:]}"


def _quota(folder: Path, name: str, at: int) -> bool:
    file = write_run(folder, name, save_every=1, steps=STEPS)
    code, said = _said(file, lambda: _at_steps(**{f"step_{at}": lambda: _limit(QUOTA)}))
    _holds(code, folder / name, said, at, stops=True)
    assert said.count("the checkpoint before stands") == 2, said[-300:]
    _goes_on(file, folder, name)
    return False


def _quota_lifted(folder: Path, name: str, at: int) -> bool:
    file = write_run(folder, name, save_every=1, steps=STEPS)
    lifted = {f"step_{at}": lambda: _limit(QUOTA), f"step_{at + 2}": lambda: _limit(resource.RLIM_INFINITY)}
    code, said = _said(file, lambda: _at_steps(**lifted))
    _holds(code, folder / name, said, STEPS, stops=False)
    assert losses(folder / name) == losses(folder / "whole"), "another run"
    return False


def _full(folder: Path, name: str, at: int) -> bool:
    """A disk with room for two checkpoints, and then a file that takes all that is left."""
    with _small_disk(folder / f"{name}-disk", 40_000) as mounted:
        if not mounted:
            return _quota(folder, name, at)
        file = write_run(folder, name, save_every=1, steps=STEPS)
        disk = folder / f"{name}-disk"
        file.write_text(file.read_text().replace(f"output_dir: {folder / name}", f"output_dir: {disk / name}"))

        def fill() -> None:
            with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(4096))

        code, said = _said(file, lambda: _at_steps(**{f"step_{at}": fill}))
        _holds(code, disk / name, said, at, stops=True)
        (disk / "filler").unlink()
        _goes_on(file, _link(disk, folder, name), name)
    return True


def _link(disk: Path, folder: Path, name: str) -> Path:
    """A folder in which the run on ``disk`` and the undisturbed one stand side by side."""
    (disk / "whole").symlink_to(folder / "whole")
    return disk


def _read_only(folder: Path, name: str, at: int) -> bool:
    with _small_disk(folder / f"{name}-disk", 40_000) as mounted:
        disk = folder / f"{name}-disk"
        if not mounted:
            return _quota(folder, name, at)
        file = write_run(folder, name, save_every=1, steps=STEPS)
        file.write_text(file.read_text().replace(f"output_dir: {folder / name}", f"output_dir: {disk / name}"))

        def protect() -> None:
            """A second mount of the same place, read-only: files that are open do not keep it from being so."""
            subprocess.run(["mount", "--bind", str(disk), str(disk)], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)

        code, said = _said(file, lambda: _at_steps(**{f"step_{at}": protect}))
        assert code in (0, 2), f"exit code {code}: {said[-300:]}"
        subprocess.run(["umount", str(disk)], check=True)
        _holds(code, disk / name, said, at)
        _goes_on(file, _link(disk, folder, name), name)
    return True


def _two_jobs(folder: Path, name: str, at: int) -> bool:
    """The second job is refused while the first trains, and touches nothing."""
    file = write_run(folder, name, save_every=1, steps=STEPS)
    paused = folder / f"{name}.paused"
    pause = {f"step_{at}": lambda: paused.touch() or signal.pause()}
    first = fork(lambda: _at_steps(**pause) or pretrain("--config", file), folder / f"{name}-first.txt")
    until = time.monotonic() + 60
    while time.monotonic() < until and not paused.exists():
        time.sleep(0.02)
    before = {path: path.read_bytes() for path in (folder / name).rglob("*") if path.is_file()}
    code, said = _said(file)
    assert code == 2 and error_line(said) is None and "another process trains" in said, f"{code}: {said[-300:]}"
    assert {path: path.read_bytes() for path in (folder / name).rglob("*") if path.is_file()} == before, "files changed"
    kill(first)
    _goes_on(file, folder, name)
    return False
