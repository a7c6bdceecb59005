"""Tokens from pixels and from text ids, with learned absolute positions."""

from __future__ import annotations

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from ..checks import patch_grid
from ..errors import ConfigError

_STD = 0.02


def resize_positions(positions: Tensor, grid: tuple[int, int], old_grid: tuple[int, int]) -> Tensor:
    """Image positions ``(1, 1 + P, D)`` for another grid of patches; the class token's stays (timm, bicubic)."""
    return resample_abs_pos_embed(positions, list(grid), list(old_grid))


class ImageEmbedding(nn.Module):
    """Patches by a strided convolution, masked ones replaced, a class token first, positions added last.

    Args:
        embed_dim: token width D.
        img_size: (height, width) in pixels that the positions are stored for.
        patch_size: side of a patch in pixels.

    Raises:
        ConfigError: the image size is no multiple of the patch size.
    """

    def __init__(self, embed_dim: int, *, img_size: tuple[int, int], patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.grid = self.grid_of(*img_size)
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        for parameter in (self.proj.weight, self.cls_token, self.mask_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=_STD)
        nn.init.zeros_(self.proj.bias)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image.

        Raises:
            ConfigError: a side is no multiple of the patch size.
        """
        return patch_grid(height, width, self.patch_size)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens ``(I, 1 + P, D)``, class token first.

        Args:
            images: ``(I, 3, H, W)``, normalised; any multiple of the patch size, positions are resized to it.
            mask: ``(I, P)`` bool, patches that the mask token replaces.
        """
        grid = self.grid_of(*images.shape[-2:])
        patches = self.proj(images).flatten(2).transpose(1, 2)
        if mask is not None:
            patches = torch.where(mask.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1).to(patches.dtype), patches], dim=1)
        return tokens + resize_positions(self.pos_embed, grid, self.grid)

    def patches(self, images: Tensor) -> Tensor:
        """Tokens ``(I, P, D)`` without a class token; positions are those of the stored grid's upper left part.

        So a token's position does not depend on how far its image was padded to the right and below.

        Raises:
            ConfigError: there are more rows or columns of patches than positions.
        """
        rows, columns = self.grid_of(*images.shape[-2:])
        if rows > self.grid[0] or columns > self.grid[1]:
            limits = " x ".join(str(side * self.patch_size) for side in self.grid)
            raise ConfigError(f"img_size: {limits} pixels, got images of {tuple(images.shape[-2:])} (raise img_size)")
        positions = self.pos_embed[:, 1:].unflatten(1, self.grid)[:, :rows, :columns].flatten(1, 2)
        return self.proj(images).flatten(2).transpose(1, 2) + positions


class TextEmbedding(nn.Module):
    """Rows of a table plus positions; padding becomes zero vectors, as in torchscale.

    Args:
        embed_dim: token width D.
        vocab_size: rows of the table.
        max_text_len: positions.
    """

    def __init__(self, embed_dim: int, *, vocab_size: int, max_text_len: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, embed_dim)
        self.pos_embed = nn.Parameter(torch.empty(1, max_text_len, embed_dim))
        nn.init.trunc_normal_(self.tokens.weight, std=_STD)
        nn.init.trunc_normal_(self.pos_embed, std=_STD)

    def forward(self, text: Tensor, padding: Tensor | None = None, *, start: int = 0) -> Tensor:
        """Tokens ``(T, L, D)``.

        Args:
            text: ``(T, L)`` int64 ids.
            padding: ``(T, L)`` bool, True = padding.
            start: position of the first token.

        Raises:
            ConfigError: the text is longer than there are positions.
        """
        end, limit = start + text.shape[1], self.pos_embed.shape[1]
        if end > limit:
            raise ConfigError(f"max_text_len: a text of {end} tokens for {limit} positions (shorten it)")
        tokens = self.tokens(text) + self.pos_embed[:, start:end]
        return tokens if padding is None else tokens.masked_fill(padding.unsqueeze(-1), 0.0)
