"""Processes that train together: who am I, and sums over all of them. Every function works in a single process too."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


def rank() -> int:
    """Number of this process, 0 when alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 when alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files."""
    return rank() == 0


class _AllReduceSum(Function):
    """y = sum over ranks of x. Each rank's loss depends on every x, so the gradients are summed over ranks as well."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of ``x`` over all ranks, with gradient; ``x`` itself when alone.

    The gradient that a rank receives is the sum of all ranks' gradients of the result. With a loss that is the same on
    every rank and gradients *averaged* over ranks (as data-parallel training does), parameters get the exact gradient.
    Every rank must call it, in the same order, in the forward and in the backward pass.
    """
    return _AllReduceSum.apply(x) if world_size() > 1 else x
