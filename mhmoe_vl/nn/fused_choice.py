"""Choice of experts and all sums over rows in one pass over the logits on a GPU, and their gradient in another.

Stock operations make some forty passes of it, and on a GPU each is a launch that the host must make: at many experts
the logits are as large as the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .fused_experts import has_triton
from .router import Choice

MOST_EXPERTS = 1024


def fused_choice_runs(logits: Tensor) -> bool:
    """Whether the kernels take these logits."""
    fits = logits.dtype == torch.float32 and len(logits) > 0 and logits.shape[1] <= MOST_EXPERTS
    return logits.device.type == "cuda" and fits and has_triton(logits.device)


def fused_choice(logits: Tensor, sizes: Sequence[int], top_k: int, *, normalize: bool) -> Choice:
    """What :meth:`~mhmoe_vl.nn.moe.RoutedExperts._choose` gives for a softmax gate and no bias, sums by stream.

    Args:
        logits: (T, E) float32.
        sizes: rows of every stream.
        top_k: choices of a row.
        normalize: divide a row's gates by their sum (never for ``top_k`` 1).
    """
    E = logits.shape[1]
    experts, gates, sums = _FusedChoice.apply(logits, tuple(sizes), top_k, normalize and top_k > 1)
    first_load, load, probabilities = sums[:, : 3 * E].view(len(sizes), 3, E).unbind(1)
    return Choice(experts, gates, load, first_load, probabilities, sums[:, -2].sum(), sums[:, -1].detach().sum())


class _FusedChoice(Function):
    """Sums (num_streams, 3 E + 2): first choices, all choices and probabilities of every expert, squares, entropies."""

    @staticmethod
    def forward(ctx, logits: Tensor, sizes: tuple[int, ...], top_k: int, normalize: bool):
        from . import fused_choice_kernels as kernels

        logits = logits.contiguous()
        T, E = logits.shape
        experts = torch.empty(T, top_k, dtype=torch.int64, device=logits.device)
        gates = logits.new_empty(T, top_k)
        sides = _sides(E, top_k)
        sums, start = [], 0
        for size in sizes:
            blocks = -(-size // sides["BLOCK_T"])
            parts = logits.new_empty(blocks, 3 * E + 2)
            if size:
                kernels.forward_kernel[(blocks,)](
                    logits, experts, gates, parts, start, start + size, E, **sides, NORMALIZE=normalize
                )
            sums.append(parts.sum(0))
            start += size
        ctx.sizes, ctx.normalize = sizes, normalize
        ctx.save_for_backward(logits, experts, gates)
        ctx.mark_non_differentiable(experts)
        return experts, gates, torch.stack(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx, _, grad_gates: Tensor, grad_sums: Tensor):
        from . import fused_choice_kernels as kernels

        logits, experts, gates = ctx.saved_tensors
        grad, sides, start = torch.empty_like(logits), _sides(logits.shape[1], experts.shape[1]), 0
        grad_gates, grad_sums = grad_gates.contiguous(), grad_sums.contiguous()
        for number, size in enumerate(ctx.sizes):
            if size:
                kernels.backward_kernel[(-(-size // sides["BLOCK_T"]),)](
                    logits, experts, gates, grad_gates, grad_sums[number], grad, start, start + size,
                    logits.shape[1], **sides, NORMALIZE=ctx.normalize,
                )  # fmt: skip
            start += size
        return grad, None, None, None


@functools.cache
def _sides(num_experts: int, top_k: int) -> dict[str, int]:
    """Sides of a tile: about 2,000 logits, what registers hold."""
    block_e = max(16, 1 << (num_experts - 1).bit_length())
    block_k = 1 << (top_k - 1).bit_length()
    return {"BLOCK_T": max(4, min(64, 2048 // block_e)), "BLOCK_E": block_e, "TOP_K": top_k, "BLOCK_K": block_k}
