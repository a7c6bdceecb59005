"""Peak memory of one forward and backward pass: on a CPU in a process of its own, whose heap returns what is freed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from ..errors import TrainingError, one_line
from .contenders import Run
from .sizes import Case, Size

_RETURNING_HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def peak_mib(case: Case, dtype: torch.dtype, device: torch.device) -> float:
    """MiB above what weights and input hold: activations, gradients, scratch.

    Raises:
        TrainingError: the process that measures failed.
    """
    if device.type == "cuda":
        return _cuda_peak(Run(case, dtype, device), device)
    command = [sys.executable, "-m", __name__, json.dumps(asdict(case)), str(dtype).removeprefix("torch.")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment = os.environ | _RETURNING_HEAP | threads
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TrainingError(f"memory of {case.name}: {one_line(done.stderr[-250:])} (look for too little memory)")
    return float(json.loads(done.stdout))


def _cuda_peak(run: Run, device: torch.device) -> float:
    run.forward_backward()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run.forward_backward()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _resident_mib(field: str) -> float:
    """``VmRSS``, held now, or ``VmHWM``, the most so far. (``getrusage`` would count the parent's too.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def _measure(text: str, dtype: str) -> float:
    """In the process of its own: a small call first, for what libraries set up once; then the highest mark of the
    resident set, which is that of the measured call."""
    values = json.loads(text)
    case = Case(**values | {"size": Size(**values["size"])})
    run = Run(case, getattr(torch, dtype), torch.device("cpu"))
    x, grad_y = run.x, run.grad_y
    run.x, run.grad_y = x[:8].detach().requires_grad_(), grad_y[:8]
    run.forward_backward()
    run.x, run.grad_y = x, grad_y
    before = _resident_mib("VmRSS")
    run.forward_backward()
    return _resident_mib("VmHWM") - before


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
