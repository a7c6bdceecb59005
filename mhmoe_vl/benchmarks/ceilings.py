"""What an accelerator can do at most, measured on it: results are shown as shares of this."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from .sizes import Size

COPY_BYTES = 2**30
MATMUL_SIDE = 8192


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """``copy``, bytes read and written a second by a large copy on the device, and ``matmul``, operations a second of a
    large product in bfloat16 (random numbers: zeros are faster)."""
    source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, MATMUL_SIDE, MATMUL_SIDE, device=device, dtype=torch.bfloat16)
    return {
        "copy": 2 * COPY_BYTES / _seconds(lambda: target.copy_(source)),
        "matmul": 2 * MATMUL_SIDE**3 / _seconds(lambda: a @ b),
    }


def _seconds(action: Callable[[], object], rounds: int = 20) -> float:
    """The median time of ``action`` between events on the device."""
    for _ in range(3):
        action()
    taken = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1000)
    return statistics.median(taken)


def matmul_share(size: Size, seconds: float, ceilings: dict[str, float]) -> float:
    """Part of the product ceiling that a forward and backward pass of a layer reached. Its operations are those of the
    products of experts, head and merge layer, three times: forward, and the gradients of inputs and of weights."""
    rows = size.tokens * size.num_subtokens * size.top_k
    matrices = 3 if size.activation == "swiglu" else 2
    experts = matrices * rows * (size.dim // size.num_subtokens) * size.hidden_dim
    return 3 * 2 * (experts + 2 * size.tokens * size.dim**2) / seconds / ceilings["matmul"]


def in_words(ceilings: dict[str, float]) -> str:
    """The ceilings in a line."""
    copy, matmul = ceilings["copy"] / 1e12, ceilings["matmul"] / 1e12
    return f"ceilings measured in the same run: copy {copy:.2f} TB/s, bfloat16 products {matmul:.0f} TFLOP/s"
