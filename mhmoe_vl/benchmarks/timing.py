"""Interleaved timing: contenders take turns, so that a change of the machine's speed meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

Clock = Callable[[], float]


class Spread(NamedTuple):
    """Median and quartiles."""

    low: float
    median: float
    high: float


def make_clock(kind: str, device: torch.device) -> Clock:
    """Seconds, read once the device has done its work.

    Args:
        kind: ``wall``, or ``cpu`` for the processor time of this process, which other processes disturb less: for one
            thread only, because threads that wait may count too.
        device: waited for.
    """
    read = time.process_time if kind == "cpu" else time.perf_counter

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return read()

    return clock


def interleave(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Clock,
    warmup: int = 1,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every run in every round. The order turns by one each round, so that nobody always follows the same
    neighbour.

    Args:
        runs: by name.
        rounds: timed rounds.
        clock: from :func:`make_clock`.
        warmup: rounds before, not timed.
        before: by name, called before every pass, not timed.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if before is not None:
                before[name]()
            start = clock()
            runs[name]()
            taken = clock() - start
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The device's work of ``run`` without the host's: a CUDA graph that replays it."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is set up once must not be captured
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, statistics.median(values), high)


def ratio(mine: Sequence[float], other: Sequence[float]) -> Spread:
    """Spread of the quotients, round by round."""
    return spread([a / b for a, b in zip(mine, other, strict=True)])
