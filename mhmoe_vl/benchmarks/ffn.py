"""Runs groups of layers and says what they cost: the results of ``tools/benchmark_ffn.py``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..errors import TrainingError
from . import parts
from .ceilings import matmul_share
from .contenders import TOLERANCE, Run
from .goals import NO_BF16, Goal, Measure, largest, memory_quotient, number, quotient
from .memory import peak_mib
from .opponents import OPPONENTS, NotHere
from .sizes import DEVICE_EXPERTS, DEVICE_GROUPS, EXPERTS, GROUPS, GROWING_EXPERTS, GROWING_TOKENS, Case, Size
from .tables import markdown
from .timing import Clock, captured, interleave, ratio, spread

FP32, BF16 = "float32", "bfloat16"
PROFILED = ("base", "device")
FLOORS = ("thick", "thin")
WARMUP = 3
"""rounds that are not timed: a library builds its kernels in them, for the usual shapes"""


def measure_group(
    group: str, members: Sequence[Case], dtype: torch.dtype, device: torch.device, *, rounds: int, clock: Clock
) -> dict[str, Any]:
    """Check, time and weigh every case of a group.

    Raises:
        TrainingError: a contender does not give the reference's numbers.
    """
    runs: dict[str, Run] = {}
    cases, skipped = [], []
    for case in members:
        try:
            run = Run(case, dtype, device)
        except NotHere as reason:
            skipped.append({"name": case.name, "why": str(reason)})
            continue
        say(f"{group} {case.name}: checking")
        cases.append({"name": case.name, "contender": case.contender, "size": asdict(case.size)})
        cases[-1]["error"] = checked(run, case)
        runs[case.name] = run
    say(f"{group}: timing")
    renew = {name: run.renew for name, run in runs.items()}
    options = {"rounds": rounds, "clock": clock, "warmup": WARMUP, "before": renew}
    backward = interleave({name: run.forward_backward for name, run in runs.items()}, **options)
    forward = interleave({name: run.forward for name, run in runs.items()}, **options)
    for entry in cases:
        entry |= {"forward_backward": backward[entry["name"]], "forward": forward[entry["name"]]}
    if device.type == "cuda":
        graphs = {name: captured(run.forward_backward, device) for name, run in runs.items()}
        for entry, seconds in zip(cases, interleave(graphs, rounds, clock).values(), strict=True):
            entry["device_alone"] = seconds
        graphs.clear()
    runs.clear()
    for entry in cases:
        say(f"{group} {entry['name']}: peak memory")
        entry["peak_mib"] = [peak_mib(next(c for c in members if c.name == entry["name"]), dtype, device)]
    dtype_name = str(dtype).removeprefix("torch.")
    return {"group": group, "dtype": dtype_name, "cases": cases, "skipped": skipped}


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def checked(run: Run, case: Case) -> float:
    """The error of a run against the reference; and equal bits when it is run again.

    Raises:
        TrainingError: it is too large, or a second pass gives other bits.
    """
    error = run.error()
    limit = TOLERANCE[run.dtype] * (10 if case.contender in OPPONENTS else 1)  # others may add up in another order
    if not error <= limit:
        raise TrainingError(f"{case.name}: error {error:.2g} against the loop in float64 (mend it before timing it)")
    (y, first), (again, second) = run.forward_backward(), run.forward_backward()
    if not torch.equal(y, again) or any(not torch.equal(first[key], second[key]) for key in first):
        raise TrainingError(f"{case.name}: two passes give different bits (mend it before timing it)")
    return error


def profile_members(
    members: Sequence[Case], dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, dict[str, float]]:
    """The profile by part of MH-MoE and of the dense layers."""
    profiled = [case for case in members if case.contender in ("mh_moe", *FLOORS)]
    return {case.name: parts.profile_parts(Run(case, dtype, device), rounds) for case in profiled}


def measure(
    groups: Mapping[str, Sequence[Case]],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    *,
    rounds: int,
    clock: Clock,
) -> dict[str, Any]:
    """Everything about ``groups`` as JSON values."""
    found: dict[str, Any] = {"groups": [], "parts": {}, "overhead": {}, "error": {}}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        for group, members in groups.items():
            found["groups"].append(measure_group(group, members, dtype, device, rounds=rounds, clock=clock))
            profiles = profile_members(members, dtype, device, rounds) if group in PROFILED else {}
            found["parts"] |= {f"{name} {case}": values for case, values in profiles.items()}
            for case, values in profiles.items():
                if case not in FLOORS:
                    found["overhead"].setdefault(name, {})[case] = parts.overhead(values)
        ours = [
            case["error"]
            for measured in found["groups"]
            for case in measured["cases"]
            if measured["dtype"] == name and case["contender"] not in FLOORS
        ]
        found["error"][name] = max(ours)
    return found


def group_table(measured: dict[str, Any], ceilings: dict[str, float] | None = None) -> str:
    """A row a case: milliseconds, memory, quotients to the floors of its group. With ``ceilings`` also forward and
    backward replayed without the host, that over the first floor, and its share of the device's products."""
    by_name = {case["name"]: case for case in measured["cases"]}
    floors = [name for name in FLOORS if name in by_name]
    if not floors and measured["cases"]:
        floors = [measured["cases"][0]["name"]]
    header = [f"{measured['group']}, {measured['dtype']}", "forward, ms", "forward + backward, ms"]
    rows = [[*header, *(f"over {floor}" for floor in floors), "peak, MiB", "error"]]
    replayed = ceilings is not None and all("device_alone" in case for case in measured["cases"])
    if replayed:
        rows[0] += ["device alone, ms", f"over {floors[0]}", "of the ceiling"]
    for case in measured["cases"]:
        times = [spread(case[what]) for what in ("forward", "forward_backward")]
        cells = [f"{1e3 * t.median:.1f} ({1e3 * t.low:.1f} to {1e3 * t.high:.1f})" for t in times]
        quotients = [ratio(case["forward_backward"], by_name[f]["forward_backward"]).median for f in floors]
        cells += [f"{q:.2f}" for q in quotients]
        rows.append([case["name"], *cells, f"{case['peak_mib'][0]:.0f}", f"{case['error']:.1e}"])
        if replayed:
            alone = spread(case["device_alone"]).median
            quotient_ = ratio(case["device_alone"], by_name[floors[0]]["device_alone"]).median
            share = matmul_share(Size(**case["size"]), alone, ceilings)
            rows[-1] += [f"{1e3 * alone:.2f}", f"{quotient_:.2f}", f"{share:.0%}"]
    skipped = "".join(f"\n- skipped {entry['name']}: {entry['why']}" for entry in measured["skipped"])
    return markdown(rows) + ("\n" + skipped if skipped else "")


def _flat(group: str, names: Sequence[str], sizes: Sequence[int]) -> Measure:
    """Cost per unit of ``sizes``, the largest over the smallest."""
    sized = list(zip(names, sizes, strict=True))
    pairs = ((a, b) for a in sized for b in sized if a != b)
    return largest(*(quotient(group, FP32, a, b, factor=y / x) for (a, x), (b, y) in pairs))


_N = [f"mh_moe E{number}" for number in EXPERTS]
_T = [f"mh_moe T{number}" for number in GROWING_TOKENS]
_G = [f"mh_moe E{number}" for number in GROWING_EXPERTS]

GOALS = [
    Goal(1, "fp32, 8 experts, inner width 768, over thick dense", 1.35, 1.20, quotient("base", FP32, _N[0], "thick")),
    Goal(2, "bf16, the same", 1.40, 1.25, quotient("base", BF16, _N[0], "thick"), unless=NO_BF16),
    *(
        Goal(3, f"over the thin floor, fp32, {count} experts", 1.20, 1.10, quotient("base", FP32, name, "thin"))
        for count, name in zip(EXPERTS, _N, strict=True)
    ),
    Goal(3, "over the thin floor, bf16, 8 experts", 1.25, 1.15, quotient("base", BF16, _N[0], "thin"), unless=NO_BF16),
    Goal(3, "over the thin floor, bf16, 32 experts", 1.35, 1.20, quotient("base", BF16, _N[1], "thin"), unless=NO_BF16),
    Goal(4, "32 experts over 8 at equal rows, fp32", 1.15, 1.05, quotient("base", FP32, _N[1], _N[0])),
    Goal(4, "128 experts over 8 at equal rows, fp32", 1.15, 1.05, quotient("base", FP32, _N[2], _N[0])),
    Goal(5, "time over one-hot dispatch", 1 / 5, 1 / 8, quotient("one_hot", FP32, "mh_moe", "one_hot")),
    Goal(5, "peak memory over one-hot dispatch", 1 / 6, 1 / 10, memory_quotient("one_hot", FP32, "mh_moe", "one_hot")),
    Goal(6, "width 192, over thick dense", 2.0, 1.7, quotient("small", FP32, "mh_moe", "thick")),
    Goal(6, "width 192, over the thin floor", 1.2, 1.1, quotient("small", FP32, "mh_moe", "thin")),
    *(
        Goal(
            6,
            f"width 96, {count} thin experts, bf16, over grouped products",
            1 / 3,
            1 / 5,
            quotient("thin_experts", BF16, f"mh_moe E{count}", f"grouped E{count}"),
            unless=NO_BF16,
        )
        for count in (41, 165)
    ),
    Goal(
        7,
        "half of all choices on one expert, over balanced",
        1.15,
        1.05,
        quotient("skewed", FP32, "skewed", "balanced"),
    ),
    Goal(8, "router, sort, permute, combine: share of the layer, fp32", 0.12, 0.08, number("overhead", FP32, _N[0])),
    Goal(8, "the same, bf16", 0.15, 0.10, number("overhead", BF16, _N[0]), unless=NO_BF16),
    Goal(9, "largest error over largest value, all gradients, fp32", 1e-5, 1e-5, number("error", FP32)),
    Goal(14, "peak memory over the thin floor's", 1.5, 1.2, memory_quotient("base", FP32, _N[0], "thin")),
    Goal(
        15,
        "time a token, 400 to 12,800 tokens, largest over smallest end",
        1.15,
        1.05,
        _flat("tokens", _T, GROWING_TOKENS),
    ),
    Goal(15, "time, 8 to 256 experts at 12,800 tokens", 1.15, 1.05, _flat("experts", _G, [1] * len(_G))),
]
"""Dropless and bitwise repeatable, of goal 9, are checked before anything is timed: the reference drops nothing."""


def _device_goal(number: int, what: str, contender: str, goal: float, stretch: float) -> list[Goal]:
    return [
        Goal(
            number,
            f"bf16, {GROUPS[group][0].size.tokens:,} tokens, {count} experts, inner width "
            f"{GROUPS[group][0].size.hidden_dim}, {what}, over thick dense",
            goal,
            stretch,
            quotient(group, BF16, f"{contender} E{count}", "thick"),
        )
        for group in DEVICE_GROUPS
        for count in DEVICE_EXPERTS
    ]


DEVICE_GOALS = [
    *_device_goal(16, "stock operations", "grouped", 1.8, 1.5),
    *_device_goal(17, "the path taken (fused kernels, where they run)", "mh_moe", 1.25, 1.1),
]
"""The goals on an accelerator."""


def goals_for(device: torch.device) -> list[Goal]:
    """The goals that a run on ``device`` is about."""
    return GOALS if device.type == "cpu" else DEVICE_GOALS
