"""What tools/expert_activation.py does: models surveyed over a data set, and the report written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from .. import distributed
from ..data.loader import StreamedShards, open_shards
from ..data.shards import expand_shards
from ..errors import ConfigError, DataError
from .activation import Activation
from .activation_report import Findings, StepMaps, report_files
from .labels import read_words
from .samples import Item, gather, open_picture
from .survey import survey
from .trace import find_encoder, trace_routing
from .trained import TrainedModel, different, kept_steps, load_model
from .visualize import write_files


def expert_activation(
    checkpoint: Sequence[str],
    data: Sequence[str],
    *,
    out: Path,
    words: Path | None = None,
    image: str | None = None,
    capacity: float | None = None,
    per: str = "token",
    batch_size: int = 8,
    num_workers: int = 1,
    device: str = "auto",
) -> int:
    """Survey checkpoints over a data set and write ``activation.json``, ``report.html`` and the figures.

    Everything is computed before the first file is written. Under torchrun the samples are dealt to the processes.

    Args:
        checkpoint: run folders, checkpoints in them, or folders written by ``save_pretrained``; dense ones are named in
            the report as such.
        data: shards: tar files, folders, patterns or http(s) addresses; none for the maps of ``image`` alone.
        out: folder to write into.
        words: a file with a word a line, whose divergence is counted apart.
        image: a picture, of which divergence maps are drawn by every kept step of the runs.
        capacity, batch_size, num_workers, device: see :func:`~.survey.survey`; ``auto`` takes a GPU where there is one.
        per: what the heat map's activation is measured by, one of :data:`~.activation.SHARES`.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError, DataError, CheckpointError: one line about what was given.
    """
    _check(checkpoint, data, image, capacity, batch_size, num_workers)
    place = distributed.select_device(device)
    distributed.init_process_group(place)
    try:
        listed = read_words(words) if words is not None else []
        item = gather([image], [], 2) if image is not None else []
        if len(item) > 1 or (item and item[0].picture is None):
            raise ConfigError(f"--image: {image} is not one picture (name a picture file)")
        source = open_shards(expand_shards(data)) if data else []
        if data and not isinstance(source, StreamedShards) and not len(source):
            raise DataError(f"{', '.join(data)}: no samples (name shards that hold some)")
        models = [load_model(path) for path in checkpoint]
        names = different([model.name for model in models])
        models = [model._replace(name=name) for name, model in zip(names, models, strict=True)]
        steps = {m.name: _steps(path) for path, m in zip(checkpoint, models, strict=True) if item and _is_sparse(m)}
        found: dict[str, Activation | None] = {}
        for model in models if data else ():
            found[model.name] = None
            if _is_sparse(model):
                options = {"batch_size": batch_size, "num_workers": num_workers, "device": place}
                found[model.name] = survey(model, source, words=listed, capacity_factor=capacity, **options)
        findings = Findings(
            models=found,
            data=", ".join(data),
            num_samples=len(source) if data else 0,
            listed=words and words.name,
            capacity_factor=capacity,
            maps={name: _maps(item[0], folders) for name, folders in steps.items()},
        )
        distributed.on_main(lambda: _write(out, findings, per))
    finally:
        distributed.shutdown()
    return 0


def _check(
    checkpoint: Sequence[str],
    data: Sequence[str],
    image: str | None,
    capacity: float | None,
    batch_size: int,
    num_workers: int,
) -> None:
    if not checkpoint:
        raise ConfigError("--checkpoint: none given (name run folders)")
    if not data and image is None:
        raise ConfigError("--data: none given (name shards, or a picture with --image)")
    if capacity is not None and not 0 < capacity < float("inf"):
        raise ConfigError(f"--capacity: {capacity} is not positive (raise it, or leave it out to drop nothing)")
    if batch_size < 1 or num_workers < 0:
        raise ConfigError(f"--batch-size {batch_size}, --num-workers {num_workers}: too small (raise it)")


def _is_sparse(model: TrainedModel) -> bool:
    return bool(model.encoder.moe_names)


def _steps(checkpoint: str) -> dict[str, Path]:
    return {f"step {step:,}": folder for step, folder in kept_steps(checkpoint)}


def _maps(item: Item, folders: dict[str, Path]) -> StepMaps:
    """The picture traced by every checkpoint."""
    traces = {}
    for name, folder in folders.items():
        encoder = find_encoder(load_model(folder).encoder)
        picture, _ = open_picture(item, encoder.img_size)
        traces[name] = trace_routing(encoder, picture[None].float() / 127.5 - 1)
    return StepMaps(torch.as_tensor(picture).permute(1, 2, 0).numpy(), traces)


def _write(out: Path, findings: Findings, per: str) -> None:
    for path in write_files(out, report_files(findings, per)):
        print(path)
