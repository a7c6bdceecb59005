"""Promise 3: stopped anywhere and resumed on any ranks and workers, the global order of samples is the same."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from mhmoe_vl.data import shards as shards_module
from mhmoe_vl.data.loader import StepDataset, open_shards, sample_order, step_loader, stream_seed
from mhmoe_vl.data.shards import ShardSet, _OpenShard
from mhmoe_vl.data.writing import pack_shards

from .harness import Found

TITLE = "exactly once"
LAYOUTS = [(1, 0), (1, 2), (2, 1), (2, 2), (4, 1)]
"""(ranks, data workers of each)"""
SAMPLES, PER_SHARD, BATCH, SEED = 96, 8, 6, 3
STEPS = SAMPLES // BATCH


def _collate(examples: dict[str, list]) -> SimpleNamespace:
    return SimpleNamespace(numbers=examples["a"], bad={})


def _number(sample, rng: np.random.Generator) -> int:
    return int(sample.members["txt"])


def _members(number: int) -> tuple[str, dict[str, str]]:
    return f"{number:04d}", {"txt": str(number)}


def _train(source: ShardSet, layout: tuple[int, int], start: int, stop: int) -> list[list[int]]:
    """Samples by step over all ranks, in the order in which one process would see them."""
    world, workers = layout
    ranks = [
        step_loader(
            StepDataset({"a": (source, BATCH, _number)}, _collate, seed=SEED, rank=rank, world=world),
            start,
            stop,
            workers,
        )
        for rank in range(world)
    ]
    return [[n for [batch] in parts for n in batch.numbers] for parts in zip(*ranks, strict=True)]


def check(folder: Path, full: bool) -> Found:
    found = Found("")
    urls = list(map(str, pack_shards(folder, range(SAMPLES), _members, samples_per_shard=PER_SHARD, progress=False)))
    source = open_shards(urls)
    order = sample_order(source.sizes, stream_seed(SEED, "a"), 0).tolist()
    draw = random.Random(0)
    points = [draw.randrange(1, STEPS) for _ in range(50 if full else 5)]
    resumed = 0
    for number, point in enumerate(points):
        before = LAYOUTS[draw.randrange(len(LAYOUTS))]
        first = _train(source, before, 0, point)
        for after in LAYOUTS if full or number == 0 else [LAYOUTS[number % len(LAYOUTS)]]:
            seen = [n for step in [*first, *_train(source, after, point, STEPS)] for n in step]
            twice = [n for n, count in Counter(seen).items() if count > 1]
            if seen != order:
                missing = set(order) - set(seen)
                found.failures.append(
                    f"{before} to {after} at step {point}: {len(twice)} twice, {len(missing)} missing"
                )
            resumed += 1
    opened, most_bytes = _cost_of_resuming(urls, points, found)
    layouts = " ".join(f"{ranks}x{workers}" for ranks, workers in LAYOUTS)
    found.figure = (
        f"{len(points)} stops, {resumed} resumes on ranks x workers {layouts}: the same order of {SAMPLES} samples,"
        f" 0 twice, 0 missing; a sample after a stop opens at most {opened} shard and reads {most_bytes} bytes of it"
    )
    if found.failures:
        found.figure = f"{len(found.failures)} of {resumed} resumes gave another order"
    found.numbers = {"stops": len(points), "resumes": resumed, "opened": opened, "bytes": most_bytes}
    return found


def _cost_of_resuming(urls: list[str], points: list[int], found: Found) -> tuple[int, int]:
    """Shards opened and bytes of samples read until the first sample after a stop is there, at most."""
    opened = most_bytes = 0
    original = _OpenShard.read
    read: list[tuple[str, int]] = []

    def counted(shard: _OpenShard, start: int, size: int) -> bytes:
        read.append((shard.url, size))
        return original(shard, start, size)

    shards_module._OpenShard.read = counted
    try:
        for point in points:
            read.clear()
            dataset = StepDataset({"a": (ShardSet(urls), BATCH, _number)}, _collate, seed=SEED)
            dataset._examples("a", range(point * BATCH, point * BATCH + 1), Counter())
            opened = max(opened, len({url for url, _ in read}))
            most_bytes = max(most_bytes, sum(size for _, size in read))
    finally:
        shards_module._OpenShard.read = original
    if opened > 1:
        found.failures.append(f"{opened} shards were read to find the position")
    return opened, most_bytes
