"""What tools/visualize_routing.py does: checkpoints traced on pictures and captions, and the files written."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.text import TextTokenizer, pad
from ..data.writing import write_files
from ..errors import CheckpointError, ConfigError, one_line
from . import figures as draw
from .plotting import png
from .routing_page import Shown, render
from .samples import Item, gather, open_picture
from .trace import (
    LayerTrace,
    RoutingTrace,
    TokenTrace,
    check_capacity,
    find_encoder,
    join_traces,
    rounded,
    trace_routing,
)
from .trained import TrainedModel, load_model, told_apart

COLUMNS = ("checkpoint", "sample", "part", "token", "block", "pool", "subtoken", "choice", "expert", "gate", "kept",
           "entropy")  # fmt: skip
MAX_PAGE_BYTES, MAX_MAPS = 50_000_000, 4


def visualize(
    checkpoint: Sequence[str],
    image: Sequence[str],
    text: Sequence[str],
    *,
    out: Path,
    capacity: float | None = None,
    img_size: Sequence[int] | None = None,
    limit: int = 100,
    batch_size: int = 16,
) -> int:
    """Trace checkpoints on pictures and captions, write ``routing.html`` and its data, and print where.

    Everything is read and computed before the first file is written, and every file is renamed into place.

    Args:
        checkpoint: one or two run folders, checkpoints in them, or folders written by ``save_pretrained``.
        image, text, limit: see :func:`~.samples.gather`.
        out: folder to write into.
        capacity: see ``capacity_factor`` of :func:`~.trace.trace_routing`; a batch is ``batch_size`` items of one kind
            (pictures, texts or pairs).
        img_size: side, or height and width, that pictures get; none means the model's own.
        batch_size: items traced at a time.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError, DataError, CheckpointError: one line about what was given.
    """
    _check(checkpoint, capacity, img_size, limit, batch_size)
    items = gather(image, text, limit)
    models = told_apart([_load_sparse_model(path, img_size) for path in checkpoint])
    _refuse_other_shapes(models)
    items = [_fitting(item, models) for item in items]
    shown = [Shown(model.name, *_trace(model, items, capacity, batch_size)) for model in models]
    size = models[0].encoder.img_size
    pictures = [None if item.picture is None else open_picture(item, size)[1] for item in items]
    files = {
        "routing.html": render(items, pictures, shown).encode(),
        "routing.json": json.dumps(_data(items, shown), allow_nan=False).encode(),
        "routing.csv": _table(shown).encode(),
    }
    if len(files["routing.html"]) > MAX_PAGE_BYTES:
        size_mb = len(files["routing.html"]) / 1e6
        raise ConfigError(f"--limit: {len(items)} items make a page of {size_mb:.0f} MB (show fewer)")
    for path in write_files(out, files | _figures(pictures, shown)):
        print(one_line(path))
    return 0


def _check(
    checkpoint: Sequence[str], capacity: float | None, img_size: Sequence[int] | None, limit: int, batch_size: int
) -> None:
    if not 1 <= len(checkpoint) <= 2:
        raise ConfigError(f"--checkpoint: {len(checkpoint)} given (name one run folder, or two to see side by side)")
    if img_size is not None and (len(img_size) > 2 or min(img_size) < 1):
        raise ConfigError(f"--img-size: {img_size} (give a side, or height and width, in pixels)")
    check_capacity(capacity, "--capacity")
    for name, value in (("limit", limit), ("batch-size", batch_size)):
        if value < 1:
            raise ConfigError(f"--{name}: {value} is below 1 (raise it)")


def _load_sparse_model(path: str, img_size: Sequence[int] | None) -> TrainedModel:
    """The model at ``path``, for pictures of ``img_size``.

    Raises:
        CheckpointError: it has no layer of experts, or see :func:`~.trained.load_model`.
    """
    changes = {} if img_size is None else {"img_size": (img_size[0], img_size[-1])}
    model = load_model(path, **changes)
    try:
        find_encoder(model.encoder)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return model


def _refuse_other_shapes(models: Sequence[TrainedModel]) -> None:
    shapes = [model.encoder.img_size for model in models]
    if any(height * shapes[0][1] != width * shapes[0][0] for height, width in shapes):
        what = " and ".join(f"{height} x {width}" for height, width in shapes)
        raise ConfigError(f"--checkpoint: pictures of {what}, not of one shape (give --img-size)")


# ------------------------------------------------------------------------------------------- tracing
def _fitting(item: Item, models: Sequence[TrainedModel]) -> Item:
    """What all checkpoints have a branch for; only samples of shards may lose something."""
    branches = set.intersection(*(set(model.encoder.modalities) for model in models))
    fitting = item
    if "text" not in branches and not item.typed:
        fitting = replace(fitting, text=None)
    if "image" not in branches and item.text is not None and not item.typed:
        fitting = replace(fitting, picture=None)
    for branch, value in (("image", fitting.picture), ("text", fitting.text)):
        if value is not None and branch not in branches:
            raise ConfigError(f"{item.place}: {branch}, but a checkpoint has no {branch} branch (leave it out)")
    if fitting.picture is None and fitting.text is None:
        raise ConfigError(f"{item.place}: nothing that the checkpoints have a branch for (give pictures)")
    return fitting


def _trace(
    model: TrainedModel, items: Sequence[Item], capacity_factor: float | None, batch_size: int
) -> tuple[RoutingTrace, list[tuple[int | None, int | None]]]:
    """One trace of all items, and where each one's picture and text stand in it: pictures alone first, pairs last."""
    kinds = [(item.picture is not None, item.text is not None) for item in items]
    traces, places, num_images, num_texts = [], {}, 0, 0
    for kind in ((True, False), (False, True), (True, True)):
        chosen = [number for number, found in enumerate(kinds) if found == kind]
        for start in range(0, len(chosen), batch_size):
            batch = chosen[start : start + batch_size]
            traces.append(_trace_batch(model, [items[number] for number in batch], capacity_factor))
            for number in batch:
                places[number] = (num_images if kind[0] else None, num_texts if kind[1] else None)
                num_images, num_texts = num_images + kind[0], num_texts + kind[1]
    return join_traces(traces), [places[number] for number in range(len(items))]


def _trace_batch(model: TrainedModel, items: Sequence[Item], capacity_factor: float | None) -> RoutingTrace:
    """A trace of items of one kind."""
    encoder, tokenizer = model.encoder, model.tokenizer
    images = text = padding = None
    pieces: list[list[str]] = []
    if items[0].picture is not None:
        images = torch.stack([open_picture(item, encoder.img_size)[0] for item in items]).float() / 127.5 - 1
    if items[0].text is not None:
        ids = [_encode(item, tokenizer, encoder.max_text_len) for item in items]
        pieces = [tokenizer.pieces(text) for text in ids]
        text, padding = pad(ids, tokenizer.pad_id)
    return trace_routing(encoder, images, text, text_padding=padding, pieces=pieces, capacity_factor=capacity_factor)


def _encode(item: Item, tokenizer: TextTokenizer, max_text_len: int) -> list[int]:
    if not item.typed:
        return tokenizer.encode(item.text, max_text_len)
    ids = tokenizer.encode(item.text)
    if len(ids) > max_text_len:
        raise ConfigError(f"--text: {len(ids)} tokens, the model takes {max_text_len} (shorten {item.text[:40]!r})")
    return ids


# --------------------------------------------------------------------------------------------- files
def _data(items: Sequence[Item], shown: Sequence[Shown]) -> dict[str, Any]:
    """What ``routing.json`` holds."""
    return {
        "samples": [{"name": item.name, "label": item.label, "text": item.text} for item in items],
        "checkpoints": [{"name": one.name, "places": one.places, **one.trace.to_dict()} for one in shown],
    }


def _table(shown: Sequence[Shown]) -> str:
    """What ``routing.csv`` holds: a line for every choice, numbers and our own words only."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for number, one in enumerate(shown):
        images = {image: sample for sample, (image, _) in enumerate(one.places)}
        texts = {text: sample for sample, (_, text) in enumerate(one.places)}
        for layer in one.trace.layers:
            for part, tokens in layer.parts.items():
                samples = texts if part == "text" else images
                writer.writerows(_lines(number, layer, part, tokens, samples))
    return file.getvalue()


def _lines(
    checkpoint: int, layer: LayerTrace, part: str, tokens: TokenTrace, samples: Mapping[int | None, int]
) -> Iterator[tuple[Any, ...]]:
    """The choices of all tokens present; ``samples`` gives the item of an image or text."""
    present = tokens.present
    sample, token = np.nonzero(present)
    row, subtoken, choice = np.indices(tokens.experts[present].shape).reshape(3, -1)
    items = [samples[number] for number in sample[row].tolist()]
    gates, entropy = (rounded(values[present]) for values in (tokens.gates, tokens.entropy))
    found = [token[row], subtoken, choice, tokens.experts[present].ravel(), gates.ravel()]
    found += [tokens.kept[present].ravel().astype(int), entropy[row, subtoken]]
    token, *others = (column.tolist() for column in found)
    pool = (repeat(layer.block), repeat(layer.pool))
    return zip(repeat(checkpoint), items, repeat(part), token, *pool, *others, strict=False)


def _figures(pictures: Sequence[Tensor | None], shown: Sequence[Shown]) -> dict[str, bytes]:
    """Figures of all items together, and divergence maps of the first pictures; none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no figures: they need matplotlib (pip install 'mhmoe-vl[viz]')")
        return {}
    traces = {one.name: one.trace for one in shown}
    made = {
        "activation": draw.activation_heat_maps(traces),
        "activated_share": draw.activated_share(traces),
        "divergence": draw.divergence_histograms(traces),
    }
    if all(trace.num_images and trace.num_texts for trace in traces.values()):
        made["modality_share"] = draw.modality_shares(traces)
    for number, (name, trace) in enumerate(traces.items(), 1):
        if trace.layers[0].num_subtokens > 1:
            made[f"coactivation-{number}"] = draw.coactivation(trace, name)
    with_picture = [number for number, picture in enumerate(pictures) if picture is not None]
    for number in with_picture[:MAX_MAPS]:
        image = pictures[number].permute(1, 2, 0).numpy()
        places = {one.places[number][0] for one in shown}
        made[f"divergence_map-{number}"] = draw.divergence_maps(image, traces, *places)
    return {f"{name}.png": png(figure) for name, figure in made.items()}
