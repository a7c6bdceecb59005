"""Dense encoder weights under the key names of the published BEiT-3 checkpoints, and back.

Published names put ``beit3.`` before the trunk and nothing before heads, and say ``A`` for images and ``B`` for texts.
Ours put ``encoder.`` before the trunk; heads keep their names (``mlm_head``, ``mim_head``, ``fc_norm``, ``head``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError

OURS, PUBLISHED = "encoder.", "beit3."

_UNUSED_ROWS = 2
"""Published position tables start with rows that no token reads."""

_LETTERS = {"image": "A", "text": "B"}

# ours, published; {m} is the modality, {n} a number, {rest} anything
_NAMES = [
    ("image_embed.pos_embed", "encoder.embed_positions.A.weight"),
    ("text_embed.pos_embed", "encoder.embed_positions.B.weight"),
    ("image_embed.{rest}", "vision_embed.{rest}"),
    ("text_embed.tokens.weight", "text_embed.weight"),
    ("blocks.{n}.norm1.{m}.{rest}", "encoder.layers.{n}.self_attn_layer_norm.{m}.{rest}"),
    ("blocks.{n}.attn.inner_norm.{m}.{rest}", "encoder.layers.{n}.self_attn.inner_attn_ln.{m}.{rest}"),
    ("blocks.{n}.attn.{proj}_proj.{m}.{rest}", "encoder.layers.{n}.self_attn.{proj}_proj.{m}.{rest}"),
    ("blocks.{n}.norm2.{m}.{rest}", "encoder.layers.{n}.final_layer_norm.{m}.{rest}"),
    ("blocks.{n}.ffn.{m}.ffn_norm.{rest}", "encoder.layers.{n}.ffn.{m}.ffn_layernorm.{rest}"),
    ("blocks.{n}.ffn.{m}.fc{one_or_two}.{rest}", "encoder.layers.{n}.ffn.{m}.fc{one_or_two}.{rest}"),
    ("norm.{m}.{rest}", "encoder.layer_norm.{m}.{rest}"),
]
_PARTS = {"n": r"\d+", "m": "image|text|A|B", "proj": "q|k|v|out", "one_or_two": "1|2", "rest": r"[\w.]+"}


def from_published(weights: Mapping[str, Tensor], source: str | Path = "weights") -> dict[str, Tensor]:
    """``weights`` in BEiT-3's names as the state dict of a model of ours whose encoder is called ``encoder``.

    Args:
        weights: tensors by published name.
        source: file to name in errors.

    Raises:
        CheckpointError: a trunk name that the published models do not have.
    """
    result = {}
    for key, value in weights.items():
        name = _rename(key, PUBLISHED, OURS, source)
        result[name] = value[_UNUSED_ROWS:].unsqueeze(0) if name.endswith(".pos_embed") else value
    return result


def to_published(weights: Mapping[str, Tensor], source: str | Path = "weights") -> dict[str, Tensor]:
    """The inverse of :func:`from_published`; the unused position rows become zeros.

    Raises:
        CheckpointError: a trunk name without a published one, as of experts or shared branches.
    """
    result = {}
    for key, value in weights.items():
        if key.startswith(OURS) and key.endswith(".pos_embed"):
            value = torch.cat([value.new_zeros(_UNUSED_ROWS, value.shape[-1]), value[0]])
        result[_rename(key, OURS, PUBLISHED, source)] = value
    return result


def _rename(key: str, old: str, new: str, source: str | Path) -> str:
    if not key.startswith(old):
        return key
    letters = _LETTERS if old == OURS else {letter: name for name, letter in _LETTERS.items()}
    for pair in _NAMES:
        template, target = pair if old == OURS else pair[::-1]
        pattern = re.sub(r"\\{(\w+)\\}", lambda part: f"(?P<{part[1]}>{_PARTS[part[1]]})", re.escape(template))
        found = re.fullmatch(pattern, key.removeprefix(old))
        if found:
            parts = found.groupdict()
            if "m" in parts:
                parts["m"] = letters[parts["m"]]
            return new + target.format(**parts)
    raise CheckpointError(f"{source}: {key} has no counterpart (only dense decoupled BEiT-3 weights are converted)")
