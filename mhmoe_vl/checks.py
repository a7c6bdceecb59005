"""Which options fit each other: asked by layers and encoder when they are built, and by the counts that build neither.

Every function raises ConfigError, one line with the value. Nothing here imports torch. At the end: which checkpoints
this version reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from . import __version__
from .errors import CheckpointError, ConfigError, one_line

CHECKPOINT_FORMAT = 1


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """``value`` is a whole number from ``least`` up."""
    if not isinstance(value, Integral) or value < least:
        raise ConfigError(f"{name} {value!r} is not a whole number from {least} up (change it)")


# ------------------------------------------------------------------------------- feed-forward layers
def inner_width(dim: int, hidden_dim: int | None) -> int:
    """``hidden_dim``, or 4 ``dim`` when it is None."""
    if hidden_dim is None:
        return 4 * dim
    check_whole("ffn: hidden_dim", hidden_dim)
    return hidden_dim


def check_experts(num_experts: int, top_k: int) -> None:
    """There are as many experts as a row chooses, and it chooses one at least."""
    check_whole("ffn: num_experts", num_experts)
    if not isinstance(top_k, Integral) or not 1 <= top_k <= num_experts:
        raise ConfigError(f"ffn: top_k {top_k!r} does not fit num_experts {num_experts} (choose 1 to {num_experts})")


def check_subtokens(dim: int, num_subtokens: int) -> None:
    """A token can be cut into its pieces."""
    check_whole("ffn: num_subtokens", num_subtokens)
    if dim % num_subtokens:
        raise ConfigError(f"ffn: num_subtokens {num_subtokens} does not divide the width {dim} (choose a divisor)")


def check_splitting(
    dim: int, num_subtokens: int, head_layers: int, merge_layers: int, conv_kernel: int | None, conv_stride: int
) -> None:
    """A token can be cut, and head and merge layer are linear layers or convolutions that see every token."""
    check_subtokens(dim, num_subtokens)
    for name, layers in (("head_layers", head_layers), ("merge_layers", merge_layers)):
        if layers not in (0, 1, 2, 3):
            raise ConfigError(f"ffn: {name} {layers!r} is out of range (choose 0 to 3)")
        if conv_kernel is not None and layers != 1:
            raise ConfigError(f"ffn: {name} {layers} does not go with conv_kernel {conv_kernel} (leave {name} at 1)")
    check_whole("ffn: conv_stride", conv_stride)
    if conv_kernel is None and conv_stride != 1:
        raise ConfigError(f"ffn: conv_stride {conv_stride} without conv_kernel (set conv_kernel or remove conv_stride)")
    if conv_kernel is not None:
        check_whole("ffn: conv_kernel", conv_kernel)
        if conv_stride > conv_kernel:
            raise ConfigError(f"ffn: conv_stride {conv_stride} skips tokens: over conv_kernel {conv_kernel} (lower it)")


# ------------------------------------------------------------------------------------------- encoder
def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in an image."""
    if height % patch_size or width % patch_size:
        raise ConfigError(
            f"img_size: {height} x {width} pixels are not whole patches of {patch_size} (choose multiples)"
        )
    return height // patch_size, width // patch_size


def check_heads(dim: int, num_heads: int) -> None:
    """Attention heads divide the width."""
    if dim % num_heads:
        raise ConfigError(f"num_heads: {num_heads} does not divide the width {dim} (choose a divisor)")


def check_blocks(
    *,
    modalities: Sequence[str],
    multiway: str,
    vl_ffn_layers: int,
    depth: int,
    sparse: bool,
    moe_every: int,
    expert_pool: str,
) -> None:
    """Branches exist, and blocks with experts and with layers for pairs fit among all blocks."""
    if not modalities or not set(modalities) <= {"image", "text"}:
        raise ConfigError(f"modalities: {list(modalities)} (choose from image and text)")
    if multiway == "shared" and expert_pool == "per_modality":
        raise ConfigError("expert_pool: per_modality with multiway: shared (choose joint, or another multiway)")
    if vl_ffn_layers and (multiway != "shared_attention" or len(set(modalities)) < 2):
        raise ConfigError(
            f"vl_ffn_layers: {vl_ffn_layers} needs multiway: shared_attention and both modalities (set it to 0)"
        )
    if vl_ffn_layers > depth:
        raise ConfigError(f"vl_ffn_layers: {vl_ffn_layers} of {depth} blocks (choose at most {depth})")
    if sparse and moe_every > depth:
        raise ConfigError(f"moe_every: {moe_every} leaves no block of {depth} with experts (choose at most {depth})")


# ---------------------------------------------------------------------------------------- checkpoints
def check_format(state: Any, place: Path) -> None:
    """Refuse the checkpoint at ``place`` if its ``state.json`` says that a later version made it (CheckpointError)."""
    found = state.get("format") if isinstance(state, dict) else None
    if not isinstance(found, int):
        raise CheckpointError(f"{place}: state.json names no format (take another checkpoint)")
    if found > CHECKPOINT_FORMAT:
        made = one_line(state.get("package"), 20)
        raise CheckpointError(f"{place}: made by mhmoe_vl {made}, this is {__version__} (upgrade)")
