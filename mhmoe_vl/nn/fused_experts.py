"""The experts of thin rows in one pass on a GPU: gather, both products, GELU, combination; nothing hidden is stored.

Stock operations write the hidden activation of every slot to memory, and MH-MoE has ``num_subtokens`` times as much of
it as a dense layer of equal FLOPs: for routed rows of at most 256 numbers that traffic costs more than the products.
Here the hidden layer of a tile of slots never leaves the chip, and the backward pass computes it anew: ten products
where stock operations need six, without their memory.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..errors import one_line
from .dispatch import Plan, make_plan

FEWEST_PROGRAMS = 512
"""programs that the gradients of the weights are spread over: about four for each processor of an H100"""


class Tiles(NamedTuple):
    """How a kernel cuts its work: slots and hidden units of a step, warps of a program, depth of its pipeline."""

    BLOCK_M: int
    BLOCK_F: int
    num_warps: int
    num_stages: int


class Launch(NamedTuple):
    """Tiles of the three kernels that multiply."""

    forward: Tiles
    rows: Tiles
    weights: Tiles


LAUNCHES = {
    192: Launch(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 128, 8, 2)),
    256: Launch(Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(32, 128, 8, 2)),
}
"""By the greatest width of a row. The first were the fastest of 24 on an H100, at 280 to 330 TFLOP/s; the second are
what just fits into its memory and registers."""


def split_width(width: int) -> tuple[int, int] | None:
    """A width as the sum of two powers of two, 16 to 256 (the second may be 0), as the kernels hold it; None if it is
    no such sum."""
    first = 1 << (width.bit_length() - 1)
    rest = width - first
    fits = 16 <= first <= 256 and width <= 256 and (rest == 0 or (rest >= 16 and rest & (rest - 1) == 0))
    return (first, rest) if fits else None


def fused_runs(device: torch.device, dtype: torch.dtype, dim: int, hidden_dim: int, bias: bool) -> bool:
    """Whether the kernels take experts of these sides on ``device``. The first time a GPU of Hopper's generation or
    later is asked, they are compiled and held against stock operations on a few rows; where they fail, one warning
    says why."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or split_width(dim) is None:
        return False
    return _probe(device, dtype, dim, hidden_dim, bias)


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton is there, and ``device`` a GPU of Hopper's generation (the kernels were tried on it) or later."""
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _probe(device: torch.device, dtype: torch.dtype, dim: int, hidden_dim: int, bias: bool) -> bool:
    if not has_triton(device):
        return False
    try:
        error = _probe_error(device, dtype, dim, hidden_dim, bias)
    except Exception as failure:  # a compiler can fail in many ways
        error, why = float("inf"), f"{type(failure).__name__}: {one_line(str(failure))[:120]}"
    else:
        why = f"their error is {error:.2g}"
    if error <= 0.05:
        return True
    warnings.warn(f"fused kernels for experts {dim} x {hidden_dim} are not used: {why}", stacklevel=2)
    return False


@torch.inference_mode(False)
@torch.enable_grad()
def _probe_error(device: torch.device, dtype: torch.dtype, dim: int, hidden_dim: int, bias: bool) -> float:
    """Largest error over largest value, of the output and all gradients, for 40 rows that two experts share."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(device).requires_grad_()

    x, gates, grad = draw(40, dim), draw(40, 1), draw(40, dim)
    w1, w2 = draw(2, dim, hidden_dim, scale=dim**-0.5), draw(2, hidden_dim, dim, scale=hidden_dim**-0.5)
    b1, b2 = (draw(2, hidden_dim), draw(2, dim)) if bias else (None, None)
    plan = make_plan(torch.arange(40, device=device).unsqueeze(1) % 2, 2, "fused")
    with torch.autocast(device.type, enabled=False):
        mine = fused_mix(x.to(dtype), gates, w1, b1, w2, b2, plan)
        hidden = [x[e::2] @ w1[e] + (b1[e] if bias else 0) for e in range(2)]
        parts = [F.gelu(h) @ w2[e] + (b2[e] if bias else 0) for e, h in enumerate(hidden)]
        stock = gates * torch.stack(parts, 1).flatten(0, 1)
        inputs = [tensor for tensor in (x, gates, w1, b1, w2, b2) if tensor is not None]
        found = [mine, *torch.autograd.grad(mine, inputs, grad.to(dtype))]
        wanted = [stock, *torch.autograd.grad(stock, inputs, grad)]
    errors = [(a.float() - b).abs().max() / b.abs().max() for a, b in zip(found, wanted, strict=True)]
    return torch.stack(errors).max().item()


def fused_mix(
    x: Tensor, gates: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, plan: Plan
) -> Tensor:
    """sum over a row's experts p of g_p (W_2p gelu(W_1p x + b_1p) + b_2p), for all rows.

    Args:
        x: rows (T, d), bfloat16 or float16; d as :func:`split_width` takes it.
        gates: (T, K) float32, the weights of the row's experts.
        w1: (E, d, F), cast to the type of ``x``; its gradient comes in its own type.
        b1: (E, F) or None, used as it is.
        w2: (E, F, d).
        b2: (E, d) or None.
        plan: of the path ``fused``.
    """
    return _FusedMix.apply(x, gates, w1, b1, w2, b2, plan)


class _FusedMix(Function):
    """Saves rows, gates and the cast matrices: neither the gathered rows nor anything of the experts."""

    @staticmethod
    def forward(ctx, x, gates, w1, b1, w2, b2, plan: Plan) -> Tensor:
        matrices = [w.to(x.dtype).contiguous() for w in (w1, w2)]
        call = _Call(x.contiguous(), gates.contiguous(), matrices[0], b1, matrices[1], b2, plan)
        ctx.plan, ctx.dtype = plan, w1.dtype
        ctx.save_for_backward(call.x, call.gates, matrices[0], b1, matrices[1], b2)
        return call.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        call = _Call(*ctx.saved_tensors, ctx.plan)
        grad_x, grad_gates, *grads = call.backward(grad.to(call.x.dtype).contiguous())
        return grad_x, grad_gates, *(None if g is None else g.to(ctx.dtype) for g in grads), None


class _Call:
    """One call of the layer, as the kernels see it; arguments as those of :func:`fused_mix`, cast."""

    def __init__(
        self, x: Tensor, gates: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, plan: Plan
    ) -> None:
        from . import fused_kernels  # imported here: Triton is not everywhere

        self.kernels = fused_kernels
        self.x, self.gates, self.w1, self.b1, self.w2, self.b2, self.plan = x, gates, w1, b1, w2, b2, plan
        self.num_experts, self.dim, self.hidden_dim = w1.shape
        self.num_slots = len(plan.row)
        self.launch = next(launch for width, launch in LAUNCHES.items() if self.dim <= width)
        self.experts = {"BLOCK_E": 1 << (self.num_experts - 1).bit_length()}
        self.width = dict(zip(("D", "D0", "D1"), (self.dim, *split_width(self.dim)), strict=True))
        self.sides = {**self.width, **self.experts, "F": self.hidden_dim, "BIAS": b1 is not None}

    def most_pieces(self, length: int) -> int:
        """Pieces of ``length`` slots that the worst distribution needs: the true number is known to the GPU alone."""
        return self.num_slots // length + self.num_experts

    def forward(self) -> Tensor:
        """Rows (T, d)."""
        y, tiles, plan = self.x.new_empty(self.num_slots, self.dim), self.launch.forward, self.plan
        self.kernels.forward_kernel[(self.most_pieces(tiles.BLOCK_M),)](
            self.x, plan.row, self.w1, self.b1, self.w2, self.b2, y, plan.ends, self.num_experts,
            **self.sides, **tiles._asdict(),
        )  # fmt: skip
        return self.gather_sum(y, self.gates)

    def gather_sum(self, y: Tensor, gates: Tensor | None) -> Tensor:
        """Slots (P, d) to rows (T, d), weighted by gates (T, K) or plain."""
        out, block = torch.empty_like(self.x), 32
        self.kernels.gather_sum_kernel[(-(-len(out) // block),)](
            y, self.plan.slot, gates, out, len(out),
            **self.width, TOP_K=len(self.plan.slot), GATED=gates is not None, BLOCK_T=block,
        )  # fmt: skip
        return out

    def backward(self, grad: Tensor) -> list[Tensor | None]:
        """Gradients of x, gates, w1, b1, w2, b2; those of weights in float32."""
        gate = self.gates.t().reshape(-1).index_select(0, self.plan.choice)
        grad_x, grad_gates, db2 = self._backward_rows(grad, gate)
        dw1, db1, dw2 = self._backward_weights(grad, gate)
        return [grad_x, grad_gates, dw1, db1, dw2, db2]

    def _backward_rows(self, grad: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        tiles, plan = self.launch.rows, self.plan
        count = self.most_pieces(tiles.BLOCK_M)
        dx, dgate = self.x.new_empty(self.num_slots, self.dim), torch.empty_like(gate)
        parts = None if self.b2 is None else self.b2.new_empty(count, self.dim)
        self.kernels.backward_rows_kernel[(count,)](
            self.x, grad, gate, plan.row, self.w1, self.b1, self.w2, self.b2, dx, dgate, parts, plan.ends,
            self.num_experts, **self.sides, **tiles._asdict(),
        )  # fmt: skip
        db2 = None
        if self.b2 is not None:
            db2 = torch.empty_like(self.b2)
            self._add_pieces(db2, parts, tiles.BLOCK_M, skip=0)
        return self.gather_sum(dx, None), dgate.index_select(0, plan.slot.view(-1)).view_as(plan.slot).t(), db2

    def _backward_weights(self, grad: Tensor, gate: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """An expert's slots are cut into chunks, so that few experts, or one with most of the rows, fill the GPU."""
        tiles = self.launch.weights
        blocks = -(-self.hidden_dim // tiles.BLOCK_F)
        more = max(16, FEWEST_PROGRAMS // blocks - self.num_experts)
        chunk = max(-(-self.num_slots // (64 * more)), 4) * 64
        tensors = [self.w1, self.b1, self.w2]
        first = [None if t is None else torch.empty_like(t, dtype=torch.float32) for t in tensors]
        later = [None if t is None else t.new_empty(more, *t.shape[1:], dtype=torch.float32) for t in tensors]
        for matrix in (1, 2):  # one after the other: the sums of both do not fit into the registers
            self.kernels.backward_weights_kernel[(blocks, self.num_experts + more)](
                self.x, grad, gate, self.plan.row, self.w1, self.b1, self.w2, *first, *later, self.plan.ends,
                self.num_experts, chunk, **self.sides, **tiles._asdict(), MATRIX=matrix,
            )  # fmt: skip
        for total, pieces in zip(first, later, strict=True):
            if total is not None:
                self._add_pieces(total, pieces, chunk, skip=1)
        return tuple(first)

    def _add_pieces(self, total: Tensor, pieces: Tensor, length: int, *, skip: int) -> None:
        size, block = total[0].numel(), 1024
        self.kernels.add_pieces_kernel[(-(-size // block), self.num_experts)](
            total, pieces, self.plan.ends, self.num_experts, size, length,
            **self.experts, SKIP=skip, BLOCK=block,
        )  # fmt: skip
