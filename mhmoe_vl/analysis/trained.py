"""Trained models to look into: the encoder, and what it reads text with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..data.text import TextTokenizer, create_text_tokenizer
from ..errors import CheckpointError, one_line
from ..models.encoder import Encoder
from ..models.factory import load_pretrained, saved_run

Named = TypeVar("Named", bound=NamedTuple)


class TrainedModel(NamedTuple):
    """An encoder, the tokenizer that it reads text with (none without a text branch), and a name to show."""

    name: str
    encoder: Encoder
    tokenizer: TextTokenizer | None


def load_model(checkpoint: str | Path, **overrides: Any) -> TrainedModel:
    """The model of a run folder, of one of its checkpoints, or of a folder written by ``save_pretrained``.

    Args:
        checkpoint: its folder.
        overrides: see :func:`~..models.factory.load_pretrained`.

    Raises:
        CheckpointError: no such thing, weights that do not fit, or a tokenizer with more pieces than there are rows.
        ConfigError: the tokenizer cannot be loaded.
    """
    path = Path(checkpoint)
    encoder = load_pretrained(path, **overrides).eval()
    name = one_line(run_name(path), 40)
    if "text" not in encoder.modalities:
        return TrainedModel(name, encoder, None)
    run = saved_run(path)
    options = getattr(run.task, "text_tokenizer", None) if run is not None else None
    tokenizer = create_text_tokenizer(**(options.model_dump() if options is not None else {"kind": "bpe"}))
    if tokenizer.vocab_size > encoder.vocab_size:
        what = f"{encoder.vocab_size} rows of text embedding, the tokenizer has {tokenizer.vocab_size} pieces"
        raise CheckpointError(f"{path}: {what} (name the run folder, whose config.yaml names the tokenizer)")
    return TrainedModel(name, encoder, tokenizer)


def run_name(path: Path) -> str:
    """The folder's name, after that of its run for a checkpoint: ``pretrain``, ``pretrain/last``."""
    path = path.resolve()
    return f"{path.parent.parent.name}/{path.name}" if path.parent.name == "checkpoints" else path.name


def different(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that came before."""
    seen: list[str] = []
    for name in names:
        count = sum(other == name for other in names[: len(seen)])
        seen.append(f"{name} ({count + 1})" if count else name)
    return seen


def told_apart(items: Sequence[Named]) -> list[Named]:
    """Named tuples with a ``name``, those that are the same made :func:`different`."""
    names = different([item.name for item in items])
    return [item._replace(name=name) for item, name in zip(items, names, strict=True)]


def kept_steps(run: str | Path) -> list[tuple[int, Path]]:
    """The checkpoints that ``train.keep_steps`` kept in a run folder: (step, folder), earliest first.

    Raises:
        CheckpointError: there are none.
    """
    folders = [path for path in (Path(run) / "checkpoints").glob("step-*") if path.name[5:].isdecimal()]
    if not folders:
        raise CheckpointError(f"{run}: no checkpoints/step-* in it (train with --train.keep_steps true)")
    return sorted((int(path.name[5:]), path) for path in folders)
