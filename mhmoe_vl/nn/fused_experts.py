"""The experts of thin rows in one pass on a GPU: gather, both products, GELU, combination; nothing hidden is stored.

Stock operations write the hidden activation of every slot to memory, and MH-MoE has ``num_subtokens`` times as much of
it as a dense layer of equal FLOPs: for routed rows of at most 256 numbers that traffic costs more than the products.
Here the hidden layer of a tile of slots never leaves the chip, and the backward pass computes it anew: nine products
where stock operations need six, without their memory.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..errors import one_line
from .dispatch import Plan, make_plan

FORWARD = {"BLOCK_M": 128, "BLOCK_F": 64, "num_warps": 8, "num_stages": 3}
BACKWARD_ROWS = {"BLOCK_M": 128, "BLOCK_F": 64, "num_warps": 8, "num_stages": 2}
BACKWARD_WEIGHTS = (
    {"FC1": True, "FC2": False, "BLOCK_M": 64, "BLOCK_F": 128, "num_warps": 8, "num_stages": 2},
    {"FC1": False, "FC2": True, "BLOCK_M": 64, "BLOCK_F": 128, "num_warps": 8, "num_stages": 2},
)
"""Tiles and pipelines, measured on an H100 at rows of 192. One launch for both matrices has no registers left."""

_PIECES = 512
"""programs that the gradient of the weights is spread over at least: about four for each processor of an H100"""


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
def _probe(device: torch.device, dtype: torch.dtype, dim: int, hidden_dim: int, bias: bool) -> bool:
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return False
    if torch.cuda.get_device_capability(device) < (9, 0):
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
    """Saves rows, gates and the cast matrices; neither the gathered rows nor the experts' outputs."""

    @staticmethod
    def forward(ctx, x, gates, w1, b1, w2, b2, plan: Plan) -> Tensor:
        from . import fused_kernels as kernels

        x = x.contiguous()
        matrices = (w1.to(x.dtype).contiguous(), w2.to(x.dtype).contiguous())
        shape = _Shape(x, matrices[0], plan, b1 is not None)
        y = x.new_empty(len(plan.row), x.shape[1])
        kernels.forward_kernel[(shape.tiles(FORWARD["BLOCK_M"]),)](
            x, plan.row, matrices[0], b1, matrices[1], b2, y, plan.ends, shape.num_experts, **shape.sides, **FORWARD
        )
        ctx.plan, ctx.shape, ctx.dtype = plan, shape, w1.dtype
        ctx.save_for_backward(x, gates, *matrices, b1, b2)
        return shape.gather_sum(y, plan, gates)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        from . import fused_kernels as kernels

        plan, shape = ctx.plan, ctx.shape
        x, gates, w1, w2, b1, b2 = ctx.saved_tensors
        grad = grad.to(x.dtype).contiguous()
        gate = gates.t().reshape(-1).index_select(0, plan.choice)
        grad_slot = x.new_empty(len(plan.row), x.shape[1])
        grad_gate = gates.new_empty(len(plan.row), dtype=torch.float32)
        kernels.backward_rows_kernel[(shape.tiles(BACKWARD_ROWS["BLOCK_M"]),)](
            x, grad, gate, plan.row, w1, b1, w2, b2, grad_slot, grad_gate, plan.ends, shape.num_experts,
            **shape.sides, **BACKWARD_ROWS,
        )  # fmt: skip
        grad_x = shape.gather_sum(grad_slot, plan, None)
        grad_gates = grad_gate.index_select(0, plan.slot.reshape(-1)).view(plan.slot.shape).t()
        grads = shape.weight_gradients(x, grad, gate, w1, b1, w2, b2, plan)
        return grad_x, grad_gates.to(gates.dtype), *(None if g is None else g.to(ctx.dtype) for g in grads), None


class _Shape:
    """Sides of one call, and the launches that depend on them alone.

    Args:
        x: rows (T, d).
        w1: (E, d, F).
        plan: of the call.
        bias: whether there are biases.
    """

    def __init__(self, x: Tensor, w1: Tensor, plan: Plan, bias: bool) -> None:
        self.num_experts, self.dim, self.hidden_dim = w1.shape
        self.num_rows, self.num_slots = len(x), len(plan.row)
        first, rest = split_width(self.dim)
        self.block_e = 1 << (self.num_experts - 1).bit_length()
        self.split = {"D": self.dim, "D0": first, "D1": rest}
        self.sides = {**self.split, "F": self.hidden_dim, "BIAS": bias, "BLOCK_E": self.block_e}

    def tiles(self, length: int) -> int:
        """The most tiles that any distribution of the slots can need: the true number is known to the GPU alone."""
        return self.num_slots // length + self.num_experts

    def gather_sum(self, y: Tensor, plan: Plan, gates: Tensor | None) -> Tensor:
        """Slots (P, d) to rows (T, d), weighted by gates (T, K) or plain."""
        from . import fused_kernels as kernels

        out, block = y.new_empty(self.num_rows, self.dim), 32
        kernels.gather_sum_kernel[(-(-self.num_rows // block),)](
            y, plan.slot, gates if gates is None else gates.contiguous(), out, self.num_rows,
            **self.split, TOP_K=len(plan.slot), GATED=gates is not None, BLOCK_T=block, num_warps=4,
        )  # fmt: skip
        return out

    def weight_gradients(self, x, grad, gate, w1, b1, w2, b2, plan: Plan) -> list[Tensor | None]:
        """Float32 gradients of w1, b1, w2 and b2. An expert's slots are cut into chunks, so that few experts, or one
        that took most of the rows, still fill the GPU."""
        from . import fused_kernels as kernels

        parts = -(-self.hidden_dim // BACKWARD_WEIGHTS[0]["BLOCK_F"])
        more = max(16, _PIECES // parts - self.num_experts)
        chunk = 1 << (max(-(-self.num_slots // more), 256) - 1).bit_length()
        tensors = [w1, b1, w2, b2]
        first = [None if t is None else torch.empty_like(t, dtype=torch.float32) for t in tensors]
        later = [None if t is None else t.new_empty(more, *t.shape[1:], dtype=torch.float32) for t in tensors]
        for launch in BACKWARD_WEIGHTS:
            kernels.backward_weights_kernel[(-(-self.hidden_dim // launch["BLOCK_F"]), self.num_experts + more)](
                x, grad, gate, plan.row, w1, b1, w2, *first, *later, plan.ends, self.num_experts,
                **self.sides, CHUNK=chunk, **launch,
            )  # fmt: skip
        for total, extra in zip(first, later, strict=True):
            if total is not None:
                size, block = total[0].numel(), 1024
                kernels.add_chunks_kernel[(-(-size // block), self.num_experts)](
                    total, extra, plan.ends, self.num_experts, size, CHUNK=chunk, BLOCK=block, BLOCK_E=self.block_e
                )
        return first
