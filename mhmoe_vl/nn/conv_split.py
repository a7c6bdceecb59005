"""Head and merge layer of MH-MoE as convolutions over the tokens of each sample (paper 1, NeurIPS appendix E).

The paper states neither padding nor alignment. Here windows of ``kernel`` tokens start every ``stride``, N tokens give
ceil(N / stride) positions, what lies outside is zero, and so is padding. A position is padding when all ``stride``
tokens of its own are. The merge layer is the transpose, cropped back to the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ConvHead(nn.Conv1d):
    """Tokens (B, N, D) to positions (B, ceil(N / stride), D).

    Args:
        dim: width D of tokens and positions.
        kernel: tokens under one window.
        stride: tokens from one window to the next, at most ``kernel``.
    """

    def __init__(self, dim: int, kernel: int, stride: int) -> None:
        super().__init__(dim, dim, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        (kernel,), (stride,), num_tokens = self.kernel_size, self.stride, x.shape[-2]
        num_positions = -(-num_tokens // stride)
        left = _left_margin(kernel, stride)
        # Convolutions refuse to give nothing: without tokens one position is computed and dropped.
        right = kernel + stride * (max(num_positions, 1) - 1) - left - num_tokens
        return super().forward(F.pad(x.mT, (left, right))).mT[..., :num_positions, :]


class ConvMerge(nn.ConvTranspose1d):
    """Positions (B, P, D) to tokens (B, P stride, D), of which the last may be more than there were.

    Args:
        dim, kernel, stride: see :class:`ConvHead`.
    """

    def __init__(self, dim: int, kernel: int, stride: int) -> None:
        super().__init__(dim, dim, kernel, stride)

    def forward(self, y: Tensor) -> Tensor:
        (kernel,), (stride,), num_positions = self.kernel_size, self.stride, y.shape[-2]
        left = _left_margin(kernel, stride)
        y = F.pad(y.mT, (0, 1)) if num_positions == 0 else y.mT  # see ConvHead
        return super().forward(y).mT[..., left : left + num_positions * stride, :]


def hide_padding(
    xs: Sequence[Tensor], paddings: Sequence[Tensor | None], kernel: int, stride: int
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Streams (B, N, D) as windows may see them, padding zeroed, and for each which positions are padding.

    Windows of one token, which is what linear layers have, see no padding but their own: nothing changes.
    """
    if kernel == 1:
        return list(xs), list(paddings)
    pairs = list(zip(xs, paddings, strict=True))
    seen = [x if padding is None else x.masked_fill(padding.unsqueeze(-1), 0) for x, padding in pairs]
    return seen, [None if padding is None else _by_position(padding, stride) for padding in paddings]


def _by_position(padding: Tensor, stride: int) -> Tensor:
    num_positions = -(-padding.shape[-1] // stride)
    filled = F.pad(padding, (0, num_positions * stride - padding.shape[-1]), value=True)
    return filled.unflatten(-1, (num_positions, stride)).all(-1)


def _left_margin(kernel: int, stride: int) -> int:
    """Zeros before the first token: half of what a window sees beyond its own tokens."""
    return (kernel - stride) // 2
