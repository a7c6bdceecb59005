"""Encoders and classifiers by configuration, by name, and from what a run saved.

Importing this module registers the image classifiers with timm, under the names that timm does not have itself.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from .. import parity as parity_rules
from ..checks import check_format
from ..config import EncoderConfig, ParityConfig, RunConfig, load, merge, validate
from ..errors import CheckpointError, ConfigError, one_line
from ..nn.embed import resize_positions
from .classifier import ImageClassifier
from .convert import OURS, PUBLISHED, from_published
from .convert_vqkd import read_weights
from .encoder import Encoder
from .heads import ClassList

# embed_dim, depth, num_heads, hidden_dim, patch_size
_SIZES = {
    "tiny": (192, 6, 3, 768, 16),
    "small": (384, 12, 6, 1536, 16),
    "base": (768, 12, 12, 3072, 16),
    "large": (1024, 24, 16, 4096, 16),
    "giant": (1408, 40, 16, 6144, 14),
}
_FAMILIES = ("beit3", "xmoe", "mhmoe")
_WEIGHTS = ("ema.safetensors", "model.safetensors")  # the moving average first, which evaluation uses too


# ---------------------------------------------------------------------------------- by configuration
def build_encoder(config: EncoderConfig, parity: ParityConfig | None = None) -> Encoder:
    """The encoder that ``config`` describes, freshly initialised.

    Args:
        config: the ``encoder`` section.
        parity: baseline for ``parity`` values in it.

    Raises:
        ConfigError: options that do not fit each other, or ``parity`` values without a baseline.
    """
    return Encoder(**parity_rules.resolve(config, parity).model_dump())


# ------------------------------------------------------------------------------------------- by name
_MODELS = {
    f"{family}_{size}_patch{patch_size}_224": (family, size)
    for family in _FAMILIES
    for size, (*_, patch_size) in _SIZES.items()
}


def list_models(filter: str = "*") -> list[str]:
    """Names for :func:`create_model` that match a shell pattern such as ``mhmoe_*``, sorted."""
    return sorted(fnmatch.filter(_MODELS, filter))


def model_config(name: str, **overrides: Any) -> EncoderConfig:
    """The ``encoder`` section of a named model.

    ``beit3_*`` is dense. ``xmoe_*`` has 8 experts with a cosine router and top-1 in every second block. ``mhmoe_*``
    has the same over 4 sub-tokens, its experts 15/16 of 4 times as wide, its router comparing in 16 / 4 axes: equal
    parameters, as published (MH-MoE, arXiv 2404.15045, tables 9 and 11).

    Args:
        name: one of :func:`list_models`.
        overrides: fields of :class:`~mhmoe_vl.config.EncoderConfig` to change.

    Raises:
        ConfigError: an unknown name (with the nearest ones) or option.
    """
    if name not in _MODELS:
        near = ", ".join(difflib.get_close_matches(name, _MODELS, n=3)) or "see list_models()"
        raise ConfigError(f"model {name!r} is not known (nearest: {near})")
    family, size = _MODELS[name]
    embed_dim, depth, num_heads, hidden_dim, patch_size = _SIZES[size]
    dense = {"kind": "dense", "hidden_dim": hidden_dim, "sub_ln": True}
    experts = {"num_experts": 8, "hidden_dim": hidden_dim, "top_k": 1, "router": {"kind": "cosine", "dim": 16}}
    split = {"num_subtokens": 4, "hidden_dim": hidden_dim * 4 * 15 // 16, "router": {"kind": "cosine", "dim": 4}}
    ffn = {"beit3": dense, "xmoe": experts | {"kind": "moe"}, "mhmoe": experts | {"kind": "mh_moe"} | split}[family]
    values = {
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "img_size": 224,
        "patch_size": patch_size,
        "ffn": ffn,
        "dense_ffn": dense,
    }
    return validate(EncoderConfig, merge(values, overrides), name)


def create_model(
    name: str,
    pretrained: bool | str | Path = False,
    *,
    num_classes: int | None = None,
    drop_rate: float = 0.0,
    **overrides: Any,
) -> Encoder | ImageClassifier:
    """A model by name.

    Args:
        name: one of :func:`list_models`.
        pretrained: what :func:`load_encoder_weights` reads; no weights are hosted under a name.
        num_classes: makes an :class:`ImageClassifier` (0: pooled features) instead of a vision-language encoder.
        drop_rate: the classifier's dropout.
        overrides: fields of :class:`~mhmoe_vl.config.EncoderConfig` to change.

    Raises:
        ConfigError: an unknown name or option, or ``pretrained=True``.
    """
    if pretrained is True:
        raise ConfigError(f"pretrained: no weights are hosted for {name} (give a run folder or a checkpoint file)")
    if num_classes is not None:
        overrides = {"modalities": ("image",), "final_norm": False} | overrides
    encoder = build_encoder(model_config(name, **overrides))
    if pretrained:
        load_encoder_weights(encoder, pretrained)
    return encoder if num_classes is None else ImageClassifier(encoder, num_classes=num_classes, drop_rate=drop_rate)


def _register(name: str) -> None:
    """Make ``timm.create_model(name)`` build our image classifier."""

    def entry(
        pretrained: bool = False,
        *,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **options: Any,
    ) -> ImageClassifier:
        return create_model(name, pretrained, num_classes=num_classes, drop_path=drop_path_rate, **options)

    entry.__name__ = name
    globals()[name] = timm.models.register_model(entry)


__all__ = [
    "build_encoder",
    "create_model",
    "list_models",
    "load_encoder_weights",
    "load_head_weights",
    "load_pretrained",
    "model_config",
    "saved_run",
]
for _name in _MODELS:
    if not timm.is_model(_name):
        _register(_name)


# ---------------------------------------------------------------------------------------- from files
def load_pretrained(run_folder: str | Path, **overrides: Any) -> Encoder:
    """The encoder that a run trained.

    Args:
        run_folder: a run folder (its best checkpoint, else its last one), one of its checkpoints, or a folder written
            by ``save_pretrained``. Where a moving average of the weights was kept, it is taken.
        overrides: fields of :class:`~mhmoe_vl.config.EncoderConfig` to change, such as ``img_size``.

    Raises:
        CheckpointError: a file is missing or from a later version, or weights do not fit (the first five, with both
            shapes).
    """
    folder = Path(run_folder)
    run, config_file = saved_run(folder), _config_file(folder) or folder / "config.json"
    if run is None:
        values, parity = _saved_encoder(config_file), None
    elif run.encoder is None:
        raise CheckpointError(f"{config_file}: encoder is not set (name a run that trained an encoder)")
    else:
        values, parity = run.encoder.model_dump(), run.parity
    encoder = build_encoder(validate(EncoderConfig, merge(values, overrides), str(config_file)), parity)
    load_encoder_weights(encoder, run_folder)
    return encoder


def saved_run(folder: str | Path) -> RunConfig | None:
    """The configuration of the run that ``folder`` is or is a checkpoint of; none for another folder."""
    file = _config_file(Path(folder))
    return None if file is None else load(RunConfig, [file])


def load_encoder_weights(encoder: Encoder, source: str | Path) -> None:
    """Fill ``encoder`` with saved weights; image positions are resized to its ``img_size``.

    Branches that ``encoder`` does not have, its final norm included, are left out; everything that it has must be
    there.

    Args:
        encoder: to fill.
        source: a run folder, a checkpoint in one, a folder written by ``save_pretrained``, or a file of weights in
            our names or in BEiT-3's. Where a moving average was kept beside the weights, it is taken.

    Raises:
        CheckpointError: a file is missing, or weights do not fit (the first five, with both shapes).
    """
    source = Path(source)
    file = _weights_file(source)
    weights = read_weights(file)
    if any(key.startswith(PUBLISHED) for key in weights):
        weights = from_published(weights, file)
    weights = {k.removeprefix(OURS): v for k, v in weights.items() if k.startswith(OURS)} or weights
    wanted = encoder.state_dict()
    weights = {key: value for key, value in weights.items() if key in wanted or not _left_out(key, encoder)}
    if "image_embed.pos_embed" in weights and "image" in encoder.modalities:
        grid = _saved_grid(file, weights["image_embed.pos_embed"])
        if grid is not None:
            positions = resize_positions(weights["image_embed.pos_embed"], encoder.image_embed.grid, grid)
            weights["image_embed.pos_embed"] = positions
    _refuse_misfits(file, weights, wanted)
    encoder.load_state_dict(weights)


def load_head_weights(model: torch.nn.Module, source: str | Path, say: Callable[[str], None] = print) -> list[str]:
    """Fill what stands outside ``model.encoder`` from saved weights, where name and shape are the same.

    So captioning goes on with the text head of pre-training; a head that the file does not have keeps its start, and so
    does a layer whose outputs are another list of classes in the file.

    Args:
        model: has its encoder under the name ``encoder``.
        source: as for :func:`load_encoder_weights`.
        say: told, in a line, of a layer that is left out for its classes.

    Returns:
        Names of the weights taken.

    Raises:
        CheckpointError: a file is missing or is not readable.
    """
    file = _weights_file(Path(source))
    saved = read_weights(file)
    for name, classes in model.named_modules():
        if isinstance(classes, ClassList) and classes.differs(saved.get(f"{name}.sha256")):
            say(f"{file}: trained for another list of classes, so {classes.layer} starts anew")
            left_out = (f"{name}.", f"{classes.layer}.")
            saved = {key: value for key, value in saved.items() if not key.startswith(left_out)}
    taken = {
        name: saved[name]
        for name, value in model.state_dict().items()
        if not name.startswith(OURS) and name in saved and saved[name].shape == value.shape
    }
    model.load_state_dict(taken, strict=False)
    return sorted(taken)


def _saved_encoder(file: Path) -> dict[str, Any]:
    """The constructor arguments that ``save_pretrained`` wrote."""
    if not file.is_file():
        raise CheckpointError(f"{file.parent}: config.yaml is missing (name a run folder or a checkpoint in one)")
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: not readable as JSON: {one_line(error, 120)} (save the encoder again)"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: holds no mapping (save the encoder again)")
    return values


def _config_file(folder: Path) -> Path | None:
    """``config.yaml`` of a run folder, or of the run that a checkpoint folder lies in."""
    places = (folder / "config.yaml", folder.parent.parent / "config.yaml")
    return next((place for place in places if folder.is_dir() and place.is_file()), None)


def _weights_file(source: Path) -> Path:
    if source.is_file():
        return source
    folders = [source, *(source / "checkpoints" / name for name in ("best", "last"))]
    for place in (folder / name for folder in folders for name in _WEIGHTS):
        if place.is_file():
            _refuse_later_format(place.with_name("state.json"))
            return place
    raise CheckpointError(
        f"{source}: no model.safetensors in it or its checkpoints (name a run folder or a checkpoint)"
    )


def _refuse_later_format(state: Path) -> None:
    """Hold a checkpoint to the format that this version writes; folders without ``state.json`` have none."""
    if state.is_file():
        try:
            values = json.loads(state.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{state}: not readable as JSON (take another checkpoint)") from error
        check_format(values, state.parent)


def _saved_grid(file: Path, positions: Tensor) -> tuple[int, int] | None:
    """Rows and columns that image positions were stored for; none when nothing says so and they form no square."""
    run, saved = _config_file(file.parent), file.parent / "config.json"
    if file.name in _WEIGHTS and (run is not None or saved.is_file()):
        values = load(RunConfig, [run]).encoder.model_dump() if run is not None else _saved_encoder(saved)
        config = validate(EncoderConfig, values, str(run or saved))
        height, width = (config.img_size,) * 2 if isinstance(config.img_size, int) else config.img_size
        return height // config.patch_size, width // config.patch_size
    side = math.isqrt(positions.shape[1] - 1)
    return (side, side) if 1 + side * side == positions.shape[1] else None


def _left_out(key: str, encoder: Encoder) -> bool:
    """Whether a saved weight belongs to a branch or norm that ``encoder`` was built without."""
    absent = {"image", "text"} - set(encoder.modalities)
    absent |= {"pair"} if absent else set()
    in_absent = any(f".{name}." in key or key.startswith(f"{name}_embed.") for name in absent)
    return in_absent or (key.startswith("norm.") and isinstance(encoder.norm, torch.nn.Identity))


def _refuse_misfits(file: Path, weights: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    misfits = [
        f"{key}: {_shape(weights, key)} in the file, {_shape(wanted, key)} in the encoder"
        for key in sorted(weights.keys() | wanted.keys())
        if _shape(weights, key) != _shape(wanted, key)
    ]
    if misfits:
        more = f"; and {len(misfits) - 5} more" if len(misfits) > 5 else ""
        raise CheckpointError(
            f"{file}: {len(misfits)} weights do not fit: {'; '.join(misfits[:5])}{more} (check the encoder section)"
        )


def _shape(weights: dict[str, Tensor], key: str) -> str:
    return " x ".join(map(str, weights[key].shape)) if key in weights else "absent"
