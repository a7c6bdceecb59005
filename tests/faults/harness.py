"""What the fault tests share: a promise's result, forked children that are watched, killed and measured."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import resource
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent

CRASHED = 70
"""exit code of a child whose action ended in an exception that nobody expected"""


@dataclass
class Found:
    """What the check of one promise found.

    Attributes:
        figure: the line of the table.
        failures: what did not hold, one line each; the promise is met when there are none.
        numbers: counts and times behind the line.
    """

    figure: str
    failures: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        return not self.failures


# -------------------------------------------------------------------------------------------- children
def fork(action: Callable[[], int | None], output: Path | None = None) -> int:
    """Run ``action`` in a forked child of its own process group; the child's id.

    Its return value is the child's exit code (none is 0), :data:`CRASHED` with a traceback when it raises. ``output``
    takes what the child says; without it, nothing does.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of any fork beside threads
        child = os.fork()
    if child:
        return child
    code = CRASHED
    try:
        os.setpgid(0, 0)
        target = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115 (lives on)
        sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        code = action() or 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else CRASHED
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: float) -> int | None:
    """The exit code (minus the signal that ended it), or none after killing a child that took longer."""
    until = time.monotonic() + seconds
    pause = 0.001
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(0.02, pause * 1.5)
    kill(child)
    return None


def kill(child: int) -> None:
    """SIGKILL to a child and everything it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)


def start_ranks(action: Callable[[int], int | None], world: int, folder: Path) -> list[int]:
    """Fork ``world`` ranks that find each other as under torchrun; what they say is in ``folder/rank-r.txt``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(world)}

    def run(rank: int) -> int | None:
        os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank))
        return action(rank)

    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(world):
        (folder / f"rank-{rank}.txt").unlink(missing_ok=True)
    return [fork(lambda rank=rank: run(rank), folder / f"rank-{rank}.txt") for rank in range(world)]


def in_ranks(action: Callable[[int], int | None], world: int, folder: Path, seconds: float = 120) -> list[int | None]:
    """Exit codes of ``action`` in ``world`` ranks; see :func:`start_ranks`."""
    return [wait(child, seconds) for child in start_ranks(action, world, folder)]


@dataclass
class Measured:
    """How a measured child ended: exit code (none: over time), MiB above its start, seconds, and what it said."""

    code: int | None
    mebibytes: float
    seconds: float
    said: str


def measured(action: Callable[[], int | None], folder: Path, seconds: float = 60.0) -> Measured:
    """Run ``action`` in a child and measure its peak memory above that at its start, and its time."""
    report, said = folder / "measured.json", folder / "said.txt"
    for path in (report, said):
        path.unlink(missing_ok=True)

    def run() -> int:
        virtual, resident = (int(n) * mmap.PAGESIZE for n in Path("/proc/self/statm").read_text().split()[:2])
        start = resident / 2**20
        resource.setrlimit(resource.RLIMIT_AS, (virtual + 2**31, resource.RLIM_INFINITY))  # others work here too
        began, code = time.monotonic(), CRASHED
        try:
            code = action() or 0
        finally:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            report.write_text(json.dumps([peak - start, time.monotonic() - began]))
        return code

    code = wait(fork(run, said), seconds)
    peak, took = json.loads(report.read_text()) if report.exists() else (float("inf"), seconds)
    return Measured(code, peak, took, said.read_text(errors="replace") if said.exists() else "")


class Phase:
    """A byte that a child sets and its parent reads: what the child is doing just now."""

    def __init__(self) -> None:
        self.byte = mmap.mmap(-1, 1)

    @property
    def now(self) -> int:
        return self.byte[0]

    @contextlib.contextmanager
    def __call__(self, number: int) -> Iterator[None]:
        before, self.byte[0] = self.byte[0], number
        try:
            yield
        finally:
            self.byte[0] = before

    def around(self, owner: Any, name: str, number: int) -> None:
        """Replace ``owner.name`` (in a child, for good) by itself within this phase."""
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            with self(number):
                return original(*arguments, **options)

        setattr(owner, name, call)


# ------------------------------------------------------------------------------------------ messages
def error_line(text: str, limit: int = 300) -> str | None:
    """Why ``text``, all that a command said on stderr, is no single well-made error line; none when it is."""
    lines = text.splitlines()
    if len(lines) != 1:
        return f"{len(lines)} lines: {text[-300:]!r}"
    [line] = lines
    if not line.startswith("error: ") or len(line) <= len("error: "):
        return f"no error line: {line[:200]!r}"
    if len(line) > limit:
        return f"{len(line)} characters: {line[:200]!r}"
    return None if line.isprintable() else f"control characters: {line!r}"


def environment(**more: str) -> dict[str, str]:
    """For a command in a process of its own."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more
