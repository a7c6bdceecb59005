"""Geometry of a report's figures: numbers in, places in an SVG out. The markup itself stands in ``report.html``.

All lengths are SVG user units. A line chart's plot area is 400 x 200 with its upper left corner at (60, 10):
step ``s`` stands at ``x = 60 + 400 (s - first) / (last - first)`` and value ``v`` at ``y = 210 - 200 place(v)``, where
``place`` is 0 at the axis' lower end and 1 at its upper end.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import one_line

WIDTH, HEIGHT = 480, 240
LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT = 60, 10, 400, 200
HEAT_WIDTH, BAR_WIDTH = 270, 125
MAX_POINTS, MAX_READOUTS, MAX_ROWS, MAX_CURVES = 600, 60, 200, 8
MAX_HEAT_COLUMNS, MAX_LOAD_COLUMNS = 120, 6


@dataclass
class Series:
    """One logged number over the steps; values that are not finite are gaps."""

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


class Axis(NamedTuple):
    """Range of a y axis, its ticks, and whether it is logarithmic."""

    low: float
    high: float
    ticks: list[float]
    log: bool = False

    def place(self, value: float) -> float:
        """0 at the lower end, 1 at the upper."""
        low, high, value = map(math.log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return (value - low) / (high - low)


class Curve(NamedTuple):
    """One line of a chart: ``raw`` and ``line`` are the ``points`` of polylines, one for each stretch without gaps."""

    label: str
    color: int
    raw: list[str]
    line: list[str]
    last: str


class Readout(NamedTuple):
    """What shows while the pointer is over a strip of the plot: a rule at ``x`` and a box of values."""

    x: float
    strip: tuple[float, float]
    box: tuple[float, float, float]
    rows: list[tuple[int, str, str]]


class Table(NamedTuple):
    """The numbers of a figure as text; ``note`` says which rows are left out."""

    columns: list[str]
    rows: list[list[str]]
    note: str


class Chart(NamedTuple):
    """A line chart: ticks are (place, text)."""

    title: str
    note: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    curves: list[Curve]
    readouts: list[Readout]
    table: Table


class PoolChart(NamedTuple):
    """A pool of experts: load over time as a picture, and bars of the load at the end, one row per expert.

    ``bars`` and ``ticks`` are SVG path data; ``labels`` holds (y, expert), ``rows`` (y, readout) per expert or,
    where these are too thin, nothing.
    """

    name: str
    height: float
    row_height: float
    picture: str
    x_ticks: list[tuple[float, str]]
    labels: list[tuple[float, int]]
    bars: list[str]
    ticks: str
    even: float
    bar_end: str
    dead: list[int]
    dead_marks: str
    rows: list[tuple[float, str]]
    table: Table


def number(value: object, digits: int = 6) -> str:
    """A number with ``digits`` significant digits; any other value as text, none as nothing."""
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return "" if value is None else str(value)


def compact(value: float) -> str:
    """A tick's text: 20000 as ``20k``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if 1e4 <= abs(value) < 1e13 and abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return number(float(value))


def percent(share: float) -> str:
    """A share as ``12.5 %``."""
    return f"{100 * share:.1f} %"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` multiples of 1, 2 or 5 times a power of ten; the first is <= ``low``, the last >= ``high``."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - 0.1 * abs(low), high + 0.1 * abs(high) if high else 1.0
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    size = next(size for size in (power, 2 * power, 5 * power, 10 * power) if (high - low) / size <= count)
    # Within rounding an end that is a multiple already is its own tick.
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [float(number(i * size, 12)) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: 1, 2, 5, 10, 20, ... or, where these are many, powers of ten; all positive."""
    if high < 4 * low:
        return [tick for tick in nice_ticks(low, high) if tick > 0]
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)]
    start = max(i for i, tick in enumerate(ticks) if tick <= low)
    stop = min(i for i, tick in enumerate(ticks) if tick >= high)
    if stop - start < 8:
        return ticks[start : stop + 1]
    decades = [float(f"1e{exponent}") for exponent in exponents]
    return decades[:: math.ceil(len(decades) / 8)]


def y_axis(values: Sequence[float], log: bool) -> Axis:
    """The axis that holds all finite ``values``; logarithmic only where all are positive."""
    finite = [value for value in values if _drawable(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    log = log and low > 0
    ticks = log_ticks(low, high) if log else nice_ticks(low, high)
    return Axis(min(low, ticks[0]), max(high, ticks[-1]), ticks, log)


def thin(values: Sequence[float], limit: int = MAX_POINTS) -> list[int]:
    """Indices of about ``limit`` points: the lowest and highest of each stretch, so that no spike is lost."""
    count, stretches = len(values), limit // 2
    if count <= limit:
        return list(range(count))
    kept = {0, count - 1}
    for i in range(stretches):
        stretch = range(i * count // stretches, (i + 1) * count // stretches)
        finite = [j for j in stretch if _drawable(values[j])] or [stretch[0]]
        kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    return sorted(kept)


def pick(count: int, limit: int) -> list[int]:
    """At most ``limit`` (>= 2) evenly spaced indices of ``count``, the first and the last among them."""
    if count <= limit:
        return list(range(count))
    return [i * (count - 1) // (limit - 1) for i in range(limit)]


def smooth(values: Sequence[float], window: float) -> list[float]:
    """Exponential mean over about ``window`` values, corrected for its start; gaps stay gaps."""
    keep, mean, weight, result = 1 - 1 / window, 0.0, 0.0, []
    for value in values:
        if _drawable(value):
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(mean / weight if _drawable(value) else math.nan)
    return result


def series_table(series: Mapping[str, Series]) -> Table:
    """Every step of the series (evenly thinned above 200 rows) with the value that each has there."""
    lookup = {name: dict(zip(s.steps, s.values, strict=True)) for name, s in series.items()}
    steps = sorted({step for s in series.values() for step in s.steps})
    kept = [steps[i] for i in pick(len(steps), MAX_ROWS)]
    rows = [[str(step), *(number(found[step]) if step in found else "" for found in lookup.values())] for step in kept]
    note = "" if len(kept) == len(steps) else f"{len(kept)} of {len(steps):,} rows; all stand in metrics.jsonl"
    return Table(["step", *series], rows, note)


def line_chart(
    title: str, series: Mapping[str, Series], *, main: str = "", log: bool = False, smoothed: bool = False
) -> Chart:
    """Lines over steps.

    Args:
        series: the lines, by label.
        main: label of the line in the text's colour, which sums the others up.
        log: logarithmic y axis, where all values are positive.
        smoothed: draw the values pale and an exponential mean over a 25th of them (from 50 values on) in front.
    """
    longest = max(len(s.values) for s in series.values())
    window = longest / 25 if smoothed and longest >= 50 else 1.0
    drawn = {name: Series(s.steps, smooth(s.values, window)) for name, s in series.items()}
    steps = sorted({step for s in series.values() for step in s.steps})
    first, last = steps[0], max(steps[-1], steps[0] + 1)
    axis = y_axis([value for s in series.values() for value in s.values], log)

    def x(step: float) -> float:
        return round(LEFT + PLOT_WIDTH * (step - first) / (last - first), 1)

    def y(value: float) -> float:
        return round(TOP + PLOT_HEIGHT * (1 - axis.place(value)), 1)

    def stretches(s: Series) -> list[str]:
        return _stretches([(x(s.steps[i]), y(s.values[i])) if _drawable(s.values[i]) else None for i in thin(s.values)])

    colors = _colors(list(series), main)
    curves = [
        Curve(name, colors[name], stretches(s) if window > 1 else [], stretches(drawn[name]), number(s.values[-1], 4))
        for name, s in series.items()
    ]
    notes = [f"bold: mean over about {window:.0f} log lines"] * (window > 1) + ["logarithmic axis"] * axis.log
    whole = [tick for tick in nice_ticks(first, last) if first <= tick <= last and tick == int(tick)]
    x_ticks = [(x(tick), compact(tick)) for tick in whole]
    y_ticks = [(y(tick), compact(tick)) for tick in axis.ticks if axis.low <= tick <= axis.high]
    readouts = _readouts(drawn, steps, colors, x)
    return Chart(title, ", ".join(notes), x_ticks, y_ticks, curves, readouts, series_table(series))


def share_chart(title: str, note: str, x_name: str, lines: Mapping[str, Sequence[float]]) -> Chart:
    """Lines of shares over a share; both axes run from 0 to 1.

    Args:
        x_name: what the horizontal axis is.
        lines: values by label, all of one length, evenly spaced from 0 to 1.
    """
    count = max(len(values) for values in lines.values())
    places = [i / max(1, count - 1) for i in range(count)]

    def x(share: float) -> float:
        return round(LEFT + PLOT_WIDTH * share, 1)

    def y(share: float) -> float:
        return round(TOP + PLOT_HEIGHT * (1 - share), 1)

    colors, ticks = _colors(list(lines), ""), [i / 5 for i in range(6)]
    curves = [
        Curve(name, colors[name], [], _stretches([(x(p), y(v)) for p, v in zip(places, values, strict=True)]), "")
        for name, values in lines.items()
    ]
    series = {name: Series(places, list(values)) for name, values in lines.items()}
    readouts = _readouts(series, places, colors, x, lambda place: f"{x_name} {place:g}")
    rows = [[number(place), *(number(float(v[i])) for v in lines.values())] for i, place in enumerate(places)]
    x_ticks, y_ticks = [(x(tick), number(tick)) for tick in ticks], [(y(tick), number(tick)) for tick in ticks]
    return Chart(title, note, x_ticks, y_ticks, curves, readouts, Table([x_name, *lines], rows, ""))


def pool_chart(name: str, steps: Sequence[int], load: np.ndarray, by_stream: np.ndarray | None) -> PoolChart:
    """One pool's load over time, and its mean over the last tenth of the lines.

    Args:
        name: of the pool.
        steps: of the logged lines.
        load: (lines, experts) share of the choices that went to each expert.
        by_stream: (lines, 2, experts) the same for image and text rows; each is brought to a sum of 1.
    """
    lines, experts = load.shape
    tail = slice(lines - math.ceil(lines / 10), None)
    final = load[tail].mean(0)
    streams = None if by_stream is None else _normalised(by_stream[tail].mean(0))
    height = max(1.5, min(18.0, 240 / experts))
    tops = [round(TOP + height * i, 2) for i in range(experts)]
    end = max(float((final if streams is None else np.vstack([final, streams])).max()), 1.5 / experts)
    scale, left = BAR_WIDTH / end, WIDTH - 10 - BAR_WIDTH
    shares, thick = ([final], 0.8 * height) if streams is None else (streams, 0.4 * height)
    bars = [
        "".join(
            f"M{left},{top + 0.1 * height + i * thick:.1f}h{share * scale:.1f}v{thick:.1f}h{-share * scale:.1f}z"
            for top, share in zip(tops, row, strict=True)
        )
        for i, row in enumerate(shares)
    ]
    ends = [round(left + float(share) * scale, 1) for share in final]
    marks = "".join(f"M{x},{top}v{height:.1f}" for top, x in zip(tops, ends, strict=True))
    dead = [i for i, share in enumerate(final) if share == 0]
    columns = np.array_split(np.arange(lines), min(lines, MAX_HEAT_COLUMNS))
    # Thinner rows cannot be pointed at.
    rows = list(zip(tops, _expert_readouts(load, final, streams), strict=True)) if height >= 3 else []
    x_ticks = [
        (round(LEFT - 20 + HEAT_WIDTH * (i + 0.5) / len(columns), 1), compact(steps[columns[i][-1]]))
        for i in pick(len(columns), 4)
    ]
    return PoolChart(
        name, height * experts, height, _heat_map(np.stack([load[c].mean(0) for c in columns])), x_ticks,
        [(round(tops[i] + height / 2, 2), i) for i in range(0, experts, math.ceil(12 / height))], bars, marks,
        round(left + scale / experts, 1), percent(end), dead,
        "".join(f"M{left + 3},{tops[i] + height / 2 - 3:.1f}l6,6m0,-6l-6,6" for i in dead), rows,
        _load_table(steps, load, final, streams),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- helpers
def _drawable(value: float) -> bool:
    """Finite, and small enough that differences are."""
    return math.isfinite(value) and abs(value) < 1e100


def _stretches(points: Sequence[tuple[float, float] | None]) -> list[str]:
    """Polyline points between the gaps; a point alone is doubled, which round line ends show as a dot."""
    result: list[list[str]] = [[]]
    for point in points:
        if point is None:
            result.append([])
        else:
            result[-1].append(f"{point[0]:g},{point[1]:g}")
    return [" ".join(stretch * 2 if len(stretch) == 1 else stretch) for stretch in result if stretch]


def _colors(names: list[str], main: str) -> dict[str, int]:
    """0, the text's colour, for the main line among several; 1, 2, ... for the others."""
    others = [name for name in names if name != main or len(names) == 1]
    return {name: others.index(name) + 1 if name in others else 0 for name in names}


def _readouts(
    series: Mapping[str, Series],
    steps: list[float],
    colors: Mapping[str, int],
    x: Callable[[float], float],
    title: Callable[[float], str] = lambda step: f"step {step:,}",
) -> list[Readout]:
    """One readout for each of up to 60 steps; its strip reaches half way to the neighbours."""
    lookup = {name: dict(zip(s.steps, s.values, strict=True)) for name, s in series.items()}
    kept = [steps[i] for i in pick(len(steps), MAX_READOUTS)]
    places = [x(step) for step in kept]
    edges = [LEFT, *((a + b) / 2 for a, b in itertools.pairwise(places)), LEFT + PLOT_WIDTH]
    result = []
    for i, (step, place) in enumerate(zip(kept, places, strict=True)):
        rows = [(colors[name], one_line(name, 24), number(v[step], 5)) for name, v in lookup.items() if step in v]
        width = 30 + 7 * max(len(label) + len(value) for _, label, value in [(0, title(step), ""), *rows])
        left = place + 8 if place < LEFT + PLOT_WIDTH / 2 else place - 8 - width
        box = (round(left, 1), round(width, 1), 22.0 + 15 * len(rows))
        strip = (round(edges[i], 1), round(edges[i + 1] - edges[i], 1))
        result.append(Readout(place, strip, box, [(-1, title(step), ""), *rows]))
    return result


def _normalised(rows: np.ndarray) -> np.ndarray:
    """Each row over its own sum; rows without choices stay zero."""
    sums = rows.sum(-1, keepdims=True)
    return np.divide(rows, sums, out=np.zeros_like(rows), where=sums > 0)


def _expert_readouts(load: np.ndarray, final: np.ndarray, streams: np.ndarray | None) -> list[str]:
    low, high = load.min(0), load.max(0)
    texts = []
    for i, share in enumerate(final):
        parts = [f"expert {i}: {percent(share)}"]
        if streams is not None:
            parts += [f"image {percent(streams[0, i])}", f"text {percent(streams[1, i])}"]
        texts.append(", ".join([*parts, f"was {percent(low[i])} to {percent(high[i])}"]))
    return texts


def _load_table(steps: Sequence[int], load: np.ndarray, final: np.ndarray, streams: np.ndarray | None) -> Table:
    kept = pick(len(steps), MAX_LOAD_COLUMNS)
    columns = ["expert", *(f"step {steps[i]}" for i in kept), "last tenth"]
    numbers = np.vstack([load[kept], final])
    if streams is not None:
        columns, numbers = [*columns, "image", "text"], np.vstack([numbers, streams])
    rows = [[str(i), *(number(float(value), 4) for value in numbers[:, i])] for i in range(load.shape[1])]
    note = "" if len(kept) == len(steps) else f"{len(kept)} of {len(steps):,} steps; all stand in metrics.jsonl"
    return Table(columns, rows, note)


def _heat_map(load: np.ndarray) -> str:
    """``load`` (columns, experts) as a PNG data address: violet to yellow for 0 to 2 even shares; orange for none."""
    level = np.clip(load * load.shape[1] / 2, 0, 1) * 254
    pixels = np.where(load == 0, 255, level).astype(np.uint8).T
    anchors = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
    ramp = np.stack([np.interp(np.linspace(0, 4, 255), range(5), channel) for channel in anchors.T], 1)
    picture = Image.frombytes("P", pixels.shape[::-1], np.ascontiguousarray(pixels).tobytes())
    picture.putpalette([*ramp.round().astype(int).ravel().tolist(), 213, 94, 0])
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
