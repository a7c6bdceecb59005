"""Whole steps, loader and heads: the results of ``tools/benchmark_training.py``."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import TrainingError
from .ffn import say
from .goals import NO_BF16, Goal, quotient
from .loading import difference, make_loaders, write_pictures
from .step import SIZES, VARIANTS, StepSize, make_heads, make_step, step_flops
from .tables import markdown
from .timing import Clock, interleave, ratio, spread

PARTS = ("loader", "heads", "tiny", "base")
"""Large models last: they leave a torn heap behind."""
HEADS = {"tokens": 1576, "dim": 768, "vocab_size": 64_010}
MOST_DIFFERENCE = 3.0
"""levels of 255 by which two decoders' and resizers' crops may differ in the mean"""


def measure_steps(
    name: str, size: StepSize, precisions: Sequence[str], device: torch.device, rounds: int, clock: Clock,
    depth: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Steps of every variant in every precision, taking turns."""
    runs: dict[str, Callable[[], float]] = {}
    for precision in precisions:
        for variant in VARIANTS:
            say(f"{name} {variant} {precision}: building")
            runs[f"{variant} {precision}"] = make_step(size, variant, precision, device, depth)
    for run, step in runs.items():
        if not math.isfinite(step()):
            raise TrainingError(f"{name} {run}: the loss is not finite (mend it before timing it)")
    say(f"{name}: timing")
    return _group(name, interleave(runs, rounds, clock))


def measure_loader(pictures: int, rounds: int, clock: Clock) -> dict[str, Any]:
    """Images a second; both paths must give the same pictures."""
    say("loader: timing")
    with tempfile.TemporaryDirectory() as folder:
        loaders = make_loaders(write_pictures(Path(folder), pictures))
        pairs = zip(loaders["ours"](), loaders["pil"](), strict=True)
        worst = max(difference(a, b) for a, b in pairs)
        if worst > MOST_DIFFERENCE:
            raise TrainingError(f"loader: crops differ by {worst:.1f} levels (mend it before timing it)")
        seconds = interleave(loaders, rounds, clock)
    measured = _group("loader", seconds)
    for case in measured["cases"]:
        case["images_per_s"] = [pictures / s for s in case["forward_backward"]]
    return measured


def measure_heads(
    sizes: Mapping[str, int], precisions: Sequence[str], device: torch.device, rounds: int, clock: Clock
) -> dict[str, Any]:
    """Heads at masked and at all positions; both must give the same loss."""
    say("heads: timing")
    runs: dict[str, Callable[[], float]] = {}
    for precision in precisions:
        heads = make_heads(**sizes, device=device, dtype=getattr(torch, precision))
        losses = [head() for head in heads.values()]
        if not math.isclose(*losses, rel_tol=1e-4 if precision == "float32" else 1e-2):
            raise TrainingError(f"heads {precision}: losses {losses} differ (mend it before timing it)")
        runs |= {f"{name} {precision}": head for name, head in heads.items()}
    return _group("heads", interleave(runs, rounds, clock))


def _group(name: str, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """As the goals read it; a step's seconds stand under the same key as a layer's."""
    cases = [{"name": case, "forward_backward": values} for case, values in seconds.items()]
    return {"group": name, "dtype": "", "cases": cases}


def measure(
    parts: Sequence[str], precisions: Sequence[str], device: torch.device, *,
    rounds: int, clock: Clock, pictures: int, depth: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Everything about ``parts`` as JSON values."""
    groups = []
    for part in parts:
        if part in SIZES:
            blocks = depth if part == "base" else None
            groups.append(measure_steps(part, SIZES[part], precisions, device, rounds, clock, blocks))
        elif part == "loader":
            groups.append(measure_loader(pictures, rounds, clock))
        else:
            groups.append(measure_heads(HEADS, precisions, device, rounds, clock))
    return {"groups": groups, "depth": depth, "heads": HEADS, "pictures": pictures}


def group_table(measured: dict[str, Any], results: dict[str, Any]) -> str:
    """A row a case: milliseconds, the quotient to the group's first case, and for steps on an accelerator the share of
    its products' ceiling."""
    first = measured["cases"][0]
    loads = "images_per_s" in first
    header = [measured["group"], "images a second and core" if loads else "ms", f"time over {first['name']}"]
    name = measured["group"]
    shared = "ceilings" in results and name in SIZES
    depth = results["depth"] if name == "base" else None
    rows = [header + ["of the ceiling"] * shared]
    for case in measured["cases"]:
        low, median, high = spread(case["images_per_s"] if loads else [1e3 * s for s in case["forward_backward"]])
        quotient_ = ratio(case["forward_backward"], first["forward_backward"]).median
        rows.append([case["name"], f"{median:.0f} ({low:.0f} to {high:.0f})", f"{quotient_:.2f}"])
        if shared:
            flops = step_flops(SIZES[name], case["name"].split()[0], depth)
            rows[-1].append(f"{1000 * flops / median / results['ceilings']['matmul']:.1%}")
    return markdown(rows)


GOALS = [
    *(
        Goal(10, f"whole step, MH-MoE at parity over dense, bf16, {size}", goal, stretch,
             quotient(size, "", "mh_moe bfloat16", "dense bfloat16"), unless=NO_BF16)
        for size, goal, stretch in (("base", 1.25, 1.10), ("tiny", 1.6, 1.35))
    ),
    Goal(11, "step in bf16 over fp32, base", 1 / 2, 1 / 3,
         quotient("base", "", "mh_moe bfloat16", "mh_moe float32"), unless=NO_BF16),
    Goal(12, "loader, images a second over the PIL float path", 1.7, 2.2,
         quotient("loader", "", "pil", "ours"), at_least=True),
    *(
        Goal(13, f"heads at masked positions, speed over all positions, 64k pieces, {name}", 5.0, 6.5,
             quotient("heads", "", f"all {precision}", f"masked {precision}"), at_least=True, unless=unless)
        for name, precision, unless in (("fp32", "float32", ""), ("bf16", "bfloat16", NO_BF16))
    ),
]  # fmt: skip
