"""Predictions of a split, exact on any number of processes and for any last batch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import ConcatDataset

from .. import distributed
from ..errors import DataError
from ..tasks.base import Batch, Record, Task


def predict(
    task: Task,
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    stopped: Callable[[], bool] = lambda: False,
) -> list[Record]:
    """The records of all ranks, one per ``id``, sorted by it; the same list on every rank.

    ``batches`` are this rank's share; ranks may hold different numbers of them. Evaluation ends early, with what it
    has, once ``stopped()``.

    Raises:
        DataError: ``batches`` say how many samples the split has (``num_samples``), and there are not as many records.
    """
    records: list[Record] = []
    cut = False
    was_training = model.training
    model.eval()
    with torch.no_grad(), distributed.independent():
        for batch in batches:
            if cut := stopped():
                break
            batch = task.prepare(batch, device)
            with autocast():
                records += task.predict(model, batch)
    model.train(was_training)
    unique = {record["id"]: record for record in distributed.gather_records(records)}
    expected = _num_samples(batches)
    if not distributed.max_over_ranks(int(cut)) and expected not in (None, len(unique)):
        found = f"{len(unique)} different predictions for {expected} samples"
        raise DataError(f"evaluation: {found} (every sample needs one, with an id of its own)")
    return [unique[identity] for identity in sorted(unique)]


def _num_samples(batches: Iterable[Batch]) -> int | None:
    """Samples of the whole split over all ranks; none where ``batches`` do not say."""
    if not isinstance(batches, ConcatDataset):
        return getattr(batches, "num_samples", None)
    parts = [_num_samples(part) for part in batches.datasets]
    return None if None in parts else sum(parts)


def predictions_path(run_dir: Path, step: int) -> Path:
    """Where the validation predictions of a step stand."""
    return run_dir / "predictions" / f"val_step-{step:08d}.jsonl"


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write texts by file name into ``folder``, each all or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, folder / name)


def write_predictions(path: Path, records: list[Record], keep: Iterable[Path] = ()) -> None:
    """Write ``records`` as JSON lines, all or nothing, and remove the folder's other predictions but ``keep``."""
    write_texts(path.parent, {path.name: "".join(json.dumps(record) + "\n" for record in records)})
    for other in set(path.parent.glob("val_step-*.jsonl")) - {path, *keep}:
        other.unlink()
