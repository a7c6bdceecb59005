"""A small task for the engine's tests: routed regression and classification on numbers that are functions of the step.

Run as a script it trains the task, so that tests can start it in processes of its own:
``python toy_task.py RUN_DIR '{"train.steps": 8, ...}' '{"toy option": ...}'``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhmoe_vl import config, distributed
from mhmoe_vl.tasks.base import ModelOutput, Task

WIDTH, CLASSES, EXPERTS, BATCH, VALIDATION = 6, 3, 4, 8, 11
TIMES = ("time", "samples_per_s", "step_seconds", "images_per_s", "memory_mb")
"""what may differ between two equal runs"""


@dataclass
class ToyBatch:
    x: Tensor
    y: Tensor
    label: Tensor
    ids: list[int]
    bad: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


class ToyStats(NamedTuple):
    load: Tensor
    entropy: Tensor
    dropped: Tensor
    num_rows: Tensor


def samples(seeds: list[int]) -> ToyBatch:
    rows = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    x = torch.stack(rows) if rows else torch.zeros(0, WIDTH)
    label = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    label[x[:, 2] > 0.3] = -1  # no target
    return ToyBatch(x, x.cumsum(1).sin(), label, list(seeds))


class ToySteps:
    """Step -> this rank's parts of the step's BATCH samples."""

    def __init__(self, task: ToyTask) -> None:
        self.task = task

    def __getitem__(self, step: int) -> list[ToyBatch]:
        task, rank, world = self.task, distributed.rank(), distributed.world_size()
        if task.signal_at == step and rank == world - 1:
            os.kill(os.getpid(), task.signal)
        if task.fail_at == step:
            raise RuntimeError("fault injected")
        pieces = task.accumulate * world
        parts = []
        for part in range(task.accumulate):
            piece = part * world + rank
            chosen = range(piece * BATCH // pieces, (piece + 1) * BATCH // pieces)
            batch = samples([1000 * (step + 1) + number for number in chosen])
            if step in task.nan_at and rank == world - 1:
                batch = replace(batch, x=torch.full_like(batch.x, torch.nan))
            batch.bad.update({"checksum": task.bad_per_part} if task.bad_per_part else {})
            parts.append(batch)
        return parts


class ToyModel(nn.Module):
    """Top-1 mixture with a balance loss over all ranks, dropout, a buffer, and a layer for half of the batch only."""

    find_unused_parameters = True

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) * 0.3)
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.extra = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: ToyBatch) -> ModelOutput:
        self.calls += self.training
        probabilities = self.router(batch.x).softmax(-1)
        gate, chosen = probabilities.max(-1)
        hidden = self.dropout(torch.einsum("bi,bij->bj", batch.x, self.experts[chosen]) * gate[:, None])
        late = torch.tensor([i % 1000 >= BATCH // 2 for i in batch.ids], dtype=torch.bool)
        if late.any():  # with two ranks, never true on the first
            hidden = torch.where(late[:, None], hidden + self.extra(batch.x), hidden)
        load = torch.bincount(chosen, minlength=EXPERTS)
        rows = distributed.all_reduce_sum(torch.tensor(float(len(batch))))
        share = distributed.all_reduce_sum(load.float()) / rows
        mean = distributed.all_reduce_sum(probabilities.sum(0)) / rows
        entropy = -(probabilities * probabilities.log()).sum(-1).mean().detach()
        stats = ToyStats(load[None], entropy, torch.tensor(0), torch.tensor(len(batch)))
        values = {"y": hidden, "logits": self.classifier(hidden)}
        return ModelOutput(values, {"balance_loss": EXPERTS * (share * mean).sum()}, {"pool": stats})

    def no_weight_decay(self) -> set[str]:
        return {"experts"}


class ToyTask(Task):
    metric = "error"
    higher_is_better = False

    def __init__(
        self,
        accumulate: int = 1,
        dropout: float = 0.0,
        nan_at: tuple[int, ...] = (),
        signal_at: int = -1,
        signal: int = signal.SIGTERM,
        fail_at: int = -1,
        bad_per_part: int = 0,
        classes: str = "",
    ) -> None:
        self.classes = classes
        self.accumulate, self.dropout, self.nan_at = accumulate, dropout, nan_at
        self.signal_at, self.signal, self.fail_at, self.bad_per_part = signal_at, signal, fail_at, bad_per_part
        self.evaluations = 0

    def dataset(self, split: str):
        if split == "train":
            return ToySteps(self)
        mine = list(range(distributed.rank(), VALIDATION, distributed.world_size()))
        if distributed.world_size() > 1:
            mine = [*mine, 0]  # seen by every rank: must count once
        return [samples(mine[first : first + 2]) for first in range(0, len(mine), 2)]

    def model(self, encoder: nn.Module | None) -> ToyModel:
        return ToyModel(self.dropout)

    def prepare(self, batch: ToyBatch, device: torch.device) -> ToyBatch:
        return batch

    def num_targets(self, batch: ToyBatch) -> dict[str, int]:
        return {"y": batch.y.numel(), "label": int((batch.label >= 0).sum()), "never": 0}

    def loss(self, output: ModelOutput, batch: ToyBatch) -> dict[str, Tensor]:
        label = F.cross_entropy(output.values["logits"], batch.label, ignore_index=-1, reduction="sum")
        return {"y": (output.values["y"] - batch.y).square().sum(), "label": label}

    def predict(self, model: nn.Module, batch: ToyBatch) -> list[dict]:
        error = (model(batch).values["y"] - batch.y).square().mean(1) + 0 * torch.rand(1)
        return [{"id": i, "error": e} for i, e in zip(batch.ids, error.tolist(), strict=True)]

    def score(self, records: list[dict]) -> dict[str, float]:
        self.evaluations += 1
        return {"error": sum(r["error"] for r in records) / len(records), "count": len(records)}

    def recorded(self) -> dict[str, str]:
        return {"classes.json": self.classes} if self.classes else {}

    def submission(self, records: list[dict]) -> dict[str, str]:
        return {"official.csv": "".join(f"{r['id']},{r['error']}\n" for r in records)}


def toy_config(output_dir: Path, **options) -> config.RunConfig:
    """A run of the toy task; options by dotted name with ``__`` for the dot."""
    values = {
        "output_dir": str(output_dir),
        "task": {"kind": "masked_modeling", "pairs": {"train": "none.tar", "batch_size": BATCH}},
        "optim": {"lr": 0.01, "warmup_steps": 2, "clip_grad": 1.0},
        "train": {"steps": 6, "precision": "float32", "device": "cpu", "num_workers": 0, "log_every": 1},
    }
    for name, value in options.items():
        section, _, key = name.partition("__")
        values[section] = {**values[section], key: value} if key else value
    return config.validate(config.RunConfig, values)


def train(output_dir: Path, toy: dict | None = None, **options) -> int:
    """Train the toy task in ``output_dir``; the exit code."""
    from mhmoe_vl.train import engine

    settings = toy_config(output_dir, **options)
    with engine.session(settings.train) as device:
        task = ToyTask(accumulate=settings.train.accumulate, **(toy or {}))
        torch.manual_seed(settings.seed)
        return engine.fit(task, task.model(None), settings, output_dir, device=device)


def metrics(run_dir: Path) -> list[dict]:
    """Lines of the log without what may differ between equal runs."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def in_ranks(function: Callable[[], None], world: int = 2) -> list[int]:
    """Exit codes of ``function`` in ``world`` forked processes that find each other as under torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.exit(function())

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=start, args=(rank,)) for rank in range(world)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of any fork beside threads
        for process in processes:
            process.start()
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


if __name__ == "__main__":
    torch.set_num_threads(1)
    toy = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    sys.exit(train(Path(sys.argv[1]), toy, **json.loads(sys.argv[2])))
