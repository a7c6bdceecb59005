"""What tools/expert_activation.py does: models surveyed over a data set, and the report written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import distributed
from ..data.loader import Source, StreamedShards, open_shards
from ..data.shards import expand_shards
from ..data.writing import write_files
from ..errors import ConfigError, DataError, one_line
from .activation import Activation
from .activation_report import Findings, StepMaps, report_files
from .labels import read_words
from .samples import Item, gather, open_picture
from .survey import survey
from .trace import check_capacity, trace_routing
from .trained import TrainedModel, kept_steps, load_model, told_apart


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
    _check(checkpoint, data, image, out, capacity, batch_size, num_workers)
    place = distributed.select_device(device)
    distributed.init_process_group(place)
    try:
        listed = read_words(words) if words is not None else []
        source = _open_data(data)
        models = told_apart([load_model(path) for path in checkpoint])
        item = _open_image(image, models)
        steps = {m.name: kept_steps(path) for path, m in zip(checkpoint, models, strict=True) if item and _is_sparse(m)}
        options = {"capacity_factor": capacity, "batch_size": batch_size, "num_workers": num_workers, "device": place}
        findings = Findings(
            models={m.name: _survey(m, source, listed, options) for m in models if data},
            data=", ".join(data),
            num_samples=len(source),
            listed=words and words.name,
            capacity_factor=capacity,
        )
        distributed.on_main(lambda: _write(out, findings, per, item, steps))
    finally:
        distributed.shutdown()
    return 0


def _check(
    checkpoint: Sequence[str],
    data: Sequence[str],
    image: str | None,
    out: Path,
    capacity: float | None,
    batch_size: int,
    num_workers: int,
) -> None:
    if not checkpoint:
        raise ConfigError("--checkpoint: none given (name run folders)")
    if not data and image is None:
        raise ConfigError("--data: none given (name shards, or a picture with --image)")
    check_capacity(capacity, "--capacity")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out: {out} is not a folder (name another one)")
    if batch_size < 1 or num_workers < 0:
        raise ConfigError(f"--batch-size {batch_size}, --num-workers {num_workers}: too small (raise it)")


def _open_data(data: Sequence[str]) -> Source:
    if not data:
        return []
    source = open_shards(expand_shards(data))
    if isinstance(source, StreamedShards):
        raise DataError(f"{source.urls[0]}: no manifest beside it (run mhmoe-vl make-manifest where the shards lie)")
    if not len(source):
        raise DataError(f"{', '.join(data)}: no samples (name shards that hold some)")
    return source


def _open_image(image: str | None, models: Sequence[TrainedModel]) -> Item | None:
    """The picture, looked at before hours are spent."""
    if image is None:
        return None
    items = gather([image], [], 2)
    if len(items) != 1 or items[0].picture is None:
        raise ConfigError(f"--image: {image} is not one picture (name a picture file)")
    for model in models:
        open_picture(items[0], model.encoder.img_size)
    return items[0]


def _is_sparse(model: TrainedModel) -> bool:
    return bool(model.encoder.moe_names)


def _survey(model: TrainedModel, source: Source, words: Sequence[str], options: Mapping[str, Any]) -> Activation | None:
    return survey(model, source, words=words, **options) if _is_sparse(model) else None


def _maps(item: Item, steps: Sequence[tuple[int, Path]]) -> StepMaps:
    """The picture traced by every checkpoint."""
    traces = {}
    for step, folder in steps:
        encoder = load_model(folder).encoder
        picture, _ = open_picture(item, encoder.img_size)
        traces[f"step {step:,}"] = trace_routing(encoder, picture[None].float() / 127.5 - 1)
    return StepMaps(picture.permute(1, 2, 0).numpy(), traces)


def _write(
    out: Path, findings: Findings, per: str, item: Item | None, steps: Mapping[str, Sequence[tuple[int, Path]]]
) -> None:
    """The report with the maps of the picture, which only the rank that writes traces."""
    findings = replace(findings, maps={name: _maps(item, folders) for name, folders in steps.items()})
    for path in write_files(out, report_files(findings, per)):
        print(one_line(path))
