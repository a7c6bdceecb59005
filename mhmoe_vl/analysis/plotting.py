"""What all matplotlib figures share: size, style, colours that colour-blind readers tell apart, text shown as it is."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec

import numpy as np

from ..errors import ConfigError

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#6f5bb5", "#333333")
"""Of lines, in order (Okabe and Ito's, less yellow, which is pale on white)."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SEQUENTIAL, DIVERGING = "cividis", "PuOr"
"""Colour maps; dark is little, and white is neither more nor less."""
DPI = 110
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "text.parse_math": False,  # names are text, not formulas
    "svg.hashsalt": "mhmoe",
}
P = ParamSpec("P")


def drawn(function: Callable[P, Any]) -> Callable[P, Any]:
    """Mark a function that draws: it runs in our style, and says what to install where matplotlib is missing."""

    @functools.wraps(function)
    def draw(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            import matplotlib
        except ImportError as error:
            raise ConfigError("figures need matplotlib (pip install 'mhmoe-vl[viz]')") from error
        with matplotlib.rc_context(_STYLE):
            return function(*args, **kwargs)

    return draw


def panels(count: int, width: float, height: float, most: int = 4) -> tuple[Any, list[Any]]:
    """A figure and ``count`` axes in rows of at most ``most``; sizes of one panel in inches."""
    from matplotlib.figure import Figure

    columns = min(count, most)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def png(figure: Any) -> bytes:
    """The figure as a PNG file, the same bytes every time."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()


def shown(name: str, limit: int = 40) -> str:
    """``name`` with what the figures' font cannot draw as ``?``, and its middle left out where it is long."""
    glyphs = _glyphs()
    text = "".join(c if c.isprintable() and ord(c) in glyphs else "?" for c in name)
    return text if len(text) <= limit else f"{text[: limit // 2 - 2]}...{text[-(limit // 2 - 1) :]}"


@functools.cache
def _glyphs() -> frozenset[int]:
    from matplotlib import font_manager, ft2font

    return frozenset(ft2font.FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap())


def heat(axes: Any, values: np.ndarray, rows: list[str], label: str, **options: Any) -> None:
    """A table of numbers as colours, row 0 on top, with its colour bar; nan is hatched.

    Args:
        axes: to draw on.
        values: (rows, columns).
        rows: names of the rows.
        label: of the colour bar, with definition and unit.
        options: of ``imshow``.
    """
    axes.set_facecolor("white")
    axes.patch.set_hatch("////")
    axes.patch.set_edgecolor("#999999")
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **options)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(whole_ticks(values.shape[1]))
    axes.spines[:].set_visible(False)
    axes.figure.colorbar(image, ax=axes, label=label, pad=0.02)


def whole_ticks(count: int, most: int = 8) -> list[int]:
    """Some of 0 to ``count`` - 1, evenly apart."""
    step = next(s for s in _steps() if count <= s * most)
    return list(range(0, count, step))


def _steps() -> Iterator[int]:
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10
