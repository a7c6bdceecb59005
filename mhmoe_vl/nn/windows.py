"""Square windows of a map of image tokens, in which a block attends instead of over the whole map (ViTDet)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Windows(NamedTuple):
    """A map of ``grid = (rows, columns)`` tokens under windows of ``size`` x ``size``, from the upper left corner on.

    Windows that reach over the right or lower edge are filled up with tokens that nobody attends to, so the windows
    of a map do not depend on how far it was padded on these sides.
    """

    grid: tuple[int, int]
    size: int

    def cut(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """``(B, rows * columns, ...)`` to ``(B * windows, size * size, ...)``; what is filled up holds ``fill``."""
        (rows, columns), size = self.grid, self.size
        x = x.unflatten(1, self.grid)
        around = [0, 0] * (x.ndim - 3) + [0, -columns % size, 0, -rows % size]
        x = pad(x, around, value=fill) if any(around) else x
        x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # (B, down, size, across, size, ...)
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`cut`."""
        (rows, columns), size = self.grid, self.size
        down, across = -(-rows // size), -(-columns // size)
        x = x.unflatten(0, (-1, down, across)).unflatten(3, (size, size)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)[:, :rows, :columns].flatten(1, 2)

    def cut_padding(self, padding: Tensor | None, tokens: Tensor) -> Tensor | None:
        """The mask (True = padding) over the windows of ``tokens (B, rows * columns, D)``; none where all are whole."""
        if padding is None:
            if not any(side % self.size for side in self.grid):
                return None
            padding = tokens.new_zeros(tokens.shape[:2], dtype=torch.bool)
        return self.cut(padding, fill=True)
