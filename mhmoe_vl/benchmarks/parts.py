"""Where the time of an MH-MoE layer goes: router, sort, permute, products, activation, combine.

torch's profiler sees every operator. The forward pass is marked by part; an operator of the backward pass belongs to
the part of the forward operator with its sequence number.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ..errors import ConfigError
from ..nn import experts, moe
from ..nn.experts import Experts
from ..nn.router import Router
from .contenders import Dense, Run
from .tables import markdown

PARTS = ("linear layers", "matmul", "bias", "activation", "permute", "combine", "sort", "router", "other")
"""``linear layers``: head and merge layer; ``matmul``, ``bias`` (with casts of matrices and of their gradients),
``activation``: of the experts (fused kernels are all ``matmul``); ``router``: scores, choice, auxiliary losses and
counts."""

OVERHEAD = ("router", "sort", "permute", "combine")
"""Parts that a dense layer does not have."""

_MARK = "part:"
_MARKED = [
    (moe, "gather_rows", "permute"),
    (moe, "scatter_rows", "combine"),
    (moe, "make_plan", "sort"),
    (experts, "permute", "permute"),
    (experts, "combine", "combine"),
    (experts, "fused_mix", "matmul"),
    (Router, "forward", "router"),
    (moe.RoutedExperts, "_choose", "router"),
    (moe.RoutedExperts, "_aux_losses", "router"),
    (moe.RoutedExperts, "_stats", "router"),
    (moe.RoutedExperts, "forward", "other"),
    (Experts, "forward", "experts"),
    (Dense, "mix", "experts"),
]
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "linear", "grouped_mm", "_grouped_mm", "mkldnn_linear", "_foreach_mm")
_ACTIVATIONS = ("gelu", "silu", "relu", "threshold", "GeluBackward", "SiluBackward")


def _marked(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with record_function(_MARK + part):
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def _marks() -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, part in _MARKED:
            stack.enter_context(patch.object(owner, name, _marked(getattr(owner, name), part)))
        yield


def profile_parts(run: Run, rounds: int = 5) -> dict[str, float]:
    """Milliseconds of each of :data:`PARTS` in a forward and backward pass, means of ``rounds``."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it speaks on stderr
    cuda = run.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with _marks():
        run.forward_backward()
        with profile(activities=activities) as profiler:
            for _ in range(rounds):
                run.forward_backward()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CPU]
    totals: dict[str, float] = defaultdict(float)
    for event, part in _by_part(events):
        totals[part] += event.self_device_time_total if cuda else event.self_cpu_time_total
    return {part: totals[part] / rounds / 1000 for part in PARTS}


def _by_part(events: list[Any]) -> Iterator[tuple[Any, str]]:
    forward: dict[int, str] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        # The operator that made a node of the graph is the last forward one with its number.
        if event.sequence_nr >= 0 and not _in_backward(event):
            forward[event.sequence_nr] = _part(event, {})
    for event in events:
        yield event, _part(event, forward)


def _ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _in_backward(event: Any) -> bool:
    return any(above.name.startswith("autograd::engine::evaluate_function") for above in _ancestors(event))


def _part(event: Any, forward: dict[int, str]) -> str:
    for above in _ancestors(event):
        if above.name == _MARK + "experts":
            return _expert_part(event)
        if above.name.startswith(_MARK):
            return above.name.removeprefix(_MARK)
        if above.name.startswith("autograd::engine::evaluate_function"):
            return forward.get(above.sequence_nr, "other")
    names = [above.name.removeprefix("aten::") for above in _ancestors(event)]
    return "linear layers" if any(name in _PRODUCTS for name in names) else "other"


def _expert_part(event: Any) -> str:
    """By the name of the operator or of what it stands in."""
    for above in _ancestors(event):
        name = above.name.removeprefix("aten::")
        if name in _PRODUCTS:
            return "matmul"
        if name.startswith(_ACTIVATIONS):
            return "activation"
    return "bias"


def draw(profiles: dict[str, dict[str, float]], path: Path) -> None:
    """A figure with one stacked bar a profile.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--figure: needs matplotlib (pip install 'mhmoe-vl[viz]')") from error
    figure = Figure(figsize=(9, 1 + 0.5 * len(profiles)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(profiles)
    for number, part in enumerate(PARTS):
        widths = [values[part] for values in profiles.values()]
        axes.barh(list(profiles), widths, left=left, label=part, color=f"C{number}")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("forward and backward, ms")
    figure.legend(ncols=len(PARTS), fontsize="small", loc="outside lower center", columnspacing=1, handlelength=1)
    figure.savefig(path)


def overhead(values: dict[str, float]) -> float:
    """Share of :data:`OVERHEAD` in the whole."""
    return sum(values[part] for part in OVERHEAD) / sum(values.values())


def table(profiles: dict[str, dict[str, float]]) -> str:
    """A row a profile, a column a part: milliseconds and share."""
    rows = [["forward and backward", *PARTS, "sum, ms"]]
    for name, values in profiles.items():
        total = sum(values.values())
        shares = [f"{value:.1f} ({value / total:.0%})" for value in values.values()]
        rows.append([name, *shares, f"{total:.1f}"])
    return markdown(rows)
