"""Teachers of the visual tokenizer: what its decoder has to say about each patch, and how wrong an answer is."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, one_line


class PixelTeacher(nn.Module):
    """The patch's own pixels in [-1, 1], channel by channel and row by row; mean squared error.

    Args:
        img_size: side of the picture, pixels.
        patch_size: side of a patch, pixels.
    """

    def __init__(self, img_size: int, *, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.target_dim = 3 * patch_size**2

    def forward(self, images: Tensor) -> Tensor:
        """Targets (B, P, target_dim) of ``images`` (B, 3, H, W) in [0, 1]."""
        return F.unfold(images * 2 - 1, self.patch_size, stride=self.patch_size).transpose(1, 2)

    def error(self, reconstruction: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error of each patch (B, P), from two (B, P, target_dim)."""
        return (reconstruction.float() - targets).square().mean(-1)


class OpenClipTeacher(nn.Module):
    """Patch features of a frozen open_clip ViT tower, after its output projection (BEiT v2); 1 - cosine.

    Args:
        img_size: side of the picture, pixels; the tower's positions are resized to it.
        patch_size: side of the tokenizer's patch, which the tower's patches must equal.
        model: open_clip model name, or ``local-dir:`` and a folder.
        pretrained: open_clip tag or local checkpoint; none means random weights, the same in every run.

    Raises:
        ConfigError: open_clip cannot build or load it, or it is not a plain ViT with these patches.
    """

    def __init__(self, img_size: int, *, patch_size: int, model: str, pretrained: str | None) -> None:
        super().__init__()
        tower = _open_clip_tower(img_size, model, pretrained)
        if tower.patch_size != (patch_size, patch_size):
            raise ConfigError(
                f"task.teacher.model: {model!r} has patches of {tower.patch_size[0]} pixels, the tokenizer of"
                f" {patch_size} (set task.model.patch_size to {tower.patch_size[0]})"
            )
        tower.output_tokens = True
        self.tower = tower.eval().requires_grad_(False)
        self.target_dim = tower.output_dim
        mean, std = tower.preprocess_cfg["mean"], tower.preprocess_cfg["std"]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Targets (B, P, target_dim), of unit length, of ``images`` (B, 3, img_size, img_size) in [0, 1]."""
        _, tokens = self.tower((images - self.mean) / self.std)
        return F.normalize((tokens @ self.tower.proj).float(), dim=-1)

    def error(self, reconstruction: Tensor, targets: Tensor) -> Tensor:
        """1 - cosine of each patch (B, P), from two (B, P, target_dim)."""
        return 1 - F.cosine_similarity(reconstruction.float(), targets, dim=-1)


TEACHERS: dict[str, type[nn.Module]] = {"pixels": PixelTeacher, "open_clip": OpenClipTeacher}


def create_teacher(img_size: int, *, patch_size: int, kind: str, **options: Any) -> nn.Module:
    """The teacher of this kind: ``forward(images) -> targets``, ``error(reconstruction, targets)``, ``target_dim``."""
    return TEACHERS[kind](img_size, patch_size=patch_size, **options)


def _open_clip_tower(img_size: int, model: str, pretrained: str | None) -> nn.Module:
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError("task.teacher: open_clip is not installed (pip install open_clip_torch)") from error
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.filterwarnings("error", "QuickGELU mismatch")  # weights would give features they were not trained for
        try:
            tower = open_clip.create_model(
                model, pretrained=pretrained, force_image_size=img_size, require_pretrained=pretrained is not None
            ).visual
        except (RuntimeError, OSError, ValueError, KeyError, UserWarning) as error:
            raise ConfigError(
                f"task.teacher: open_clip cannot make {model!r} with weights {pretrained!r}: {one_line(error, 160)}"
                " (name a model and a tag from open_clip.list_pretrained(), or a local checkpoint)"
            ) from error
    plain = isinstance(tower, open_clip.transformer.VisionTransformer) and tower.attn_pool is None
    if not plain or tower.final_ln_after_pool:
        raise ConfigError(f"task.teacher.model: {model!r} has no plain ViT tower (name one such as 'ViT-B-16')")
    return tower
