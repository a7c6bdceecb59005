"""Visual tokenizer weights under the key names of BEiT v2's released VQ-KD checkpoints."""

from __future__ import annotations

import argparse
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError, one_line

MAX_PICKLE_BYTES = 8 * 2**20
"""Most bytes of the part that names the tensors of a ``torch.save`` file."""

# ours -> published
_PREFIXES = {
    "encoder.": "encoder.",
    "encoder_head.": "encode_task_layer.",
    "codebook.weight": "quantize.embedding.weight",
    "decoder.": "decoder.",
    "decoder_head.": "decode_task_layer.",
}
# Counters of the released training code, and what it keeps besides the tokenizer; no output depends on them.
_LEFT_OUT = (
    "quantize.cluster_size",
    "quantize.embedding.cluster_size",
    "quantize.embedding.embed_avg",
    "quantize.embedding.initted",
    "loss",
    "teacher",
    "scaling",
)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file, or from a ``torch.save`` file (its "model" entry if it has one).

    Raises:
        CheckpointError: the file is missing, unreadable, holds something other than tensors by name, or would unpack to
            more than its size.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        _refuse_bombs(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # released files carry their arguments
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # there is no common base of what a damaged file makes the two readers raise
        raise CheckpointError(f"{path}: cannot be read: {one_line(error, 160)} (name a whole checkpoint)") from error
    weights = loaded.get("model", loaded) if isinstance(loaded, dict) else {}
    if not weights or not all(type(k) is str and isinstance(v, Tensor) for k, v in weights.items()):
        raise CheckpointError(f"{path}: holds no tensors by name (name a file with a state dict)")
    for name, value in weights.items():
        if value.layout != torch.strided or value.nbytes > value.untyped_storage().nbytes():
            shape = one_line(tuple(value.shape), 60)
            raise CheckpointError(
                f"{path}: {one_line(name, 80)!r} of shape {shape} is not stored whole (name another file)"
            )
    return weights


def _refuse_bombs(path: Path) -> None:
    """Refuse what could take any memory: compressed members, which torch.save never writes, and calls that fill it."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError("not as torch.save writes since version 1.6 (save it again)")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CheckpointError("compressed members")
        for member in members:
            if member.filename.endswith("data.pkl"):
                if member.file_size > MAX_PICKLE_BYTES:
                    raise CheckpointError(f"data.pkl of {member.file_size} bytes")
                _refuse_filling(archive.read(member))


def _refuse_filling(stream: bytes) -> None:
    """``bytearray`` and ``encode`` pass torch's own list of harmless names, and make gigabytes of one number."""
    strings: list[str] = []
    for _, value, _ in pickletools.genops(stream):
        strings += str(value).split() if isinstance(value, str) else []
    if found := {"bytearray", "encode"} & set(strings):
        raise CheckpointError(f"calls {sorted(found)[0]}")


def from_published(weights: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """State dict of :class:`~.visual_tokenizer.VisualTokenizer` from ``weights`` in BEiT v2's names.

    Args:
        weights: tensors by published name; the training code's counters and teacher are left out.
        source: what errors name.

    Raises:
        CheckpointError: a name is not one of a VQ-KD tokenizer, or the codebook or a ViT is missing.
    """
    names = {theirs: ours for ours, theirs in _PREFIXES.items()}
    state: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.startswith(_LEFT_OUT):
            continue
        prefix = next((prefix for prefix in names if name.startswith(prefix)), None)
        if prefix is None:
            raise CheckpointError(f"{source}: {name!r} is no part of a VQ-KD tokenizer (name another checkpoint)")
        state[names[prefix] + name.removeprefix(prefix)] = value
    for needed in _SIZED:
        if needed not in state:
            raise CheckpointError(f"{source}: the tokenizer's {needed!r} is missing (name another checkpoint)")
    state["codebook.unused_steps"] = torch.zeros(len(state["codebook.weight"]), dtype=torch.int64)
    state["codebook.initialized"] = torch.tensor(True)
    return state


def to_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` (of a ``VisualTokenizer``) in BEiT v2's names, with the training code's counters at zero."""
    weights: dict[str, Tensor] = {}
    for name, value in state.items():
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is not None:
            weights[_PREFIXES[prefix] + name.removeprefix(prefix)] = value
    codes = state["codebook.weight"]
    weights["quantize.cluster_size"] = codes.new_zeros(len(codes))
    weights["quantize.embedding.cluster_size"] = codes.new_zeros(len(codes))
    weights["quantize.embedding.embed_avg"] = codes.clone()
    weights["quantize.embedding.initted"] = codes.new_ones(1)
    return weights


_SIZED = (
    "encoder.patch_embed.proj.weight",
    "encoder.pos_embed",
    "decoder.patch_embed.proj.weight",
    "decoder_head.2.weight",
    "codebook.weight",
)


def sizes_of(state: dict[str, Tensor], *, num_heads: int | None = None) -> dict[str, Any]:
    """Arguments of ``VisualTokenizer`` that fit ``state``, read from its shapes.

    Args:
        num_heads: attention heads, which no shape shows; none means 64 wide ones.
    """
    embed_dim, _, _, patch_size = state["encoder.patch_embed.proj.weight"].shape
    decoder_embed_dim, code_dim = state["decoder.patch_embed.proj.weight"].shape[:2]
    grid_size = round((state["encoder.pos_embed"].shape[1] - 1) ** 0.5)
    return {
        "img_size": grid_size * patch_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": _depth(state, "encoder"),
        "num_heads": num_heads or max(1, embed_dim // 64),
        "decoder_embed_dim": decoder_embed_dim,
        "decoder_depth": _depth(state, "decoder"),
        "decoder_num_heads": num_heads or max(1, decoder_embed_dim // 64),
        "num_codes": len(state["codebook.weight"]),
        "code_dim": code_dim,
        "target_dim": len(state["decoder_head.2.weight"]),
        "ema_decay": 0.99,
        "commitment_weight": 1.0,
        "revive_after": 0,
    }


def _depth(state: dict[str, Tensor], part: str) -> int:
    return len({name.split(".")[2] for name in state if name.startswith(f"{part}.blocks.")})
