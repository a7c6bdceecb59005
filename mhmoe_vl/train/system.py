"""What the engine asks of the machine: precision, heap, random numbers, signals, a lock on the run folder."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import random
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType

import numpy as np
import torch

from ..errors import ConfigError, one_line

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def raise_malloc_thresholds() -> None:
    """Let glibc keep freed memory instead of returning every buffer above 32 MiB to the kernel.

    Fresh pages cost more than the arithmetic of elementwise operations on a CPU. The process keeps its largest heap
    until it ends, so this is for programs, not for libraries. Does nothing where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 2**28)


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether to run under bfloat16 autocast: ``auto`` does where the processor multiplies bfloat16 itself."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def seed_all(*numbers: int) -> None:
    """Start torch's, NumPy's and Python's generators from a mix of ``numbers`` (seed, step, rank, ...).

    The engine does so before every step: random numbers are then a function of the step alone, and neither an
    evaluation nor a stop in between can change them.
    """
    words = np.random.SeedSequence(numbers).generate_state(3, np.uint64)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]) % 2**32)
    random.seed(int(words[2]))


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far, in MiB: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold ``run_dir``, created when missing, for this process; released by its end however it ends.

    Raises:
        ConfigError: the folder cannot be written, or another process trains in it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("w")
    except OSError as error:
        reason = one_line(error.strerror)
        raise ConfigError(f"output_dir: {run_dir}: {reason} (name a folder you may write to)") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"output_dir: another process trains in {run_dir} (name another folder)") from error
        yield


class StopSignals:
    """Context in which the first SIGTERM, SIGINT or SIGUSR1 is only noted; the second one ends the process at once.

    Attributes:
        received: number of the signal, 0 while there was none.
    """

    HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in self.HANDLED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for handled in self.HANDLED:
            signal.signal(handled, signal.SIG_DFL)
