"""Promise 14: what all checks together cost, measured side by side with the same work without them.

Loader: checksums of members, and the rest of the bookkeeping, against the same loader with checksums left out. Steps:
the finite test, the copy of buffers, the counts over ranks and the alarms, as train/step.py makes them, against a step
of plain layers of the tiny size. The two are timed in turns, each first every other time, and the median quotient of
the turns' processor times is the figure: a machine that changes its speed changes both.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from mhmoe_vl.data.loader import StepDataset, open_shards
from mhmoe_vl.data.transforms import ImageTransform
from mhmoe_vl.data.writing import write_shard
from mhmoe_vl.train.alarms import CollapseAlarm, SpikeAlarm

from .harness import Found

TITLE = "cost of the checks"
LOADER, STEP = 3.0, 1.0
"""percent"""


def check(folder: Path, full: bool) -> Found:
    found = Found("")
    loader = _loader_cost(folder, 60 if full else 8)
    step = _step_cost(60 if full else 12)
    # Few repetitions give no figure: the limits are for make faults.
    if full and loader > LOADER:
        found.failures.append(f"the loader's checks cost {loader:.2f} %")
    if full and step > STEP:
        found.failures.append(f"a step's checks cost {step:.2f} %")
    found.figure = f"{loader:.1f} % of the loader's throughput (photos of 500 x 375), {step:.2f} % of step time"
    found.numbers = {"loader_percent": loader, "step_percent": step}
    return found


def _quotient(repeats: int, plain: Callable[[], object], checked: Callable[[], object]) -> float:
    """Processor seconds of ``checked`` over those of ``plain``, median of the turns."""
    quotients = []
    for turn in range(repeats):
        seconds = {}
        for action in (plain, checked) if turn % 2 else (checked, plain):
            began = time.process_time()
            action()
            seconds[action] = time.process_time() - began
        quotients.append(seconds[checked] / seconds[plain])
    return median(quotients)


def _loader_cost(folder: Path, repeats: int) -> float:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (47, 63, 3), np.uint8)
    photo = _photo(noise)
    write_shard(folder / "a.tar", ((f"{i:03d}", {"jpg": photo, "txt": "a photo"}) for i in range(64)))
    transform = ImageTransform(224, train=True)
    source = open_shards([str(folder / "a.tar")])
    dataset = StepDataset({"a": (source, 32, lambda sample, rng: transform(sample.image(), rng))}, _Batch)

    def plain() -> None:
        table = source._shard(0).table
        before = table.places[:, 2].copy()
        table.places[:, 2] = -1  # no checksum known, so none is computed
        try:
            dataset[0]
        finally:
            table.places[:, 2] = before

    dataset[0]
    return 100 * (_quotient(repeats, plain, lambda: dataset[0]) - 1)


def _photo(noise: np.ndarray) -> bytes:
    """A picture of 500 x 375 with as much detail as a photo, some 60 kB."""
    file = io.BytesIO()
    Image.fromarray(noise).resize((500, 375)).save(file, "JPEG", quality=92)
    return file.getvalue()


class _Batch:
    def __init__(self, examples: dict[str, list]) -> None:
        self.bad: dict[str, int] = {}


def _step_cost(repeats: int) -> float:
    """The checks of a step alone, against a whole step of the tiny encoder's size."""
    torch.manual_seed(0)
    layers = [torch.nn.TransformerEncoderLayer(192, 3, 768, batch_first=True, dropout=0.0) for _ in range(6)]
    model = torch.nn.Sequential(*layers)
    model.register_buffer("load", torch.zeros(3, 32))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randn(16, 64, 192)
    values = {f"load/{name}": [1 / 32] * 32 for name in range(3)}
    routing, spikes = CollapseAlarm({}), SpikeAlarm()

    def step() -> torch.Tensor:
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    def checks() -> None:
        buffers = [buffer.clone() for buffer in model.buffers()]
        totals = torch.cat([torch.zeros(6), 0 * torch.ones(())[None]])
        assert bool(torch.isfinite(totals).all()) and buffers
        routing.check(1, values)
        spikes.check(1.0)

    step()
    return 100 * _quotient(repeats, step, lambda: [checks() for _ in range(50)]) / 50
