"""``curves.json``: curves of shares over shares, such as precision over recall, for the run's report.

The file is a list of figures; the values of a line run evenly over 0 to 1::

    [{"title": "Precision of boxes", "note": "mean over categories", "x": "recall", "lines": {"IoU 0.50": [1, 0.9, 0]}}]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..data import records
from ..data.manifest import write_text
from .charts import MAX_CURVES, Chart, share_chart

FILE = "curves.json"


def write_curves(run_dir: str | Path, figures: Iterable[Mapping[str, Any]]) -> None:
    """Write ``curves.json`` into a run folder, from figures as in the file."""
    write_text(Path(run_dir) / FILE, json.dumps(list(figures), allow_nan=False) + "\n")


def _is_lines(value: Any) -> bool:
    if not isinstance(value, dict) or not 0 < len(value) <= MAX_CURVES:
        return False
    lists = [line for line in value.values() if isinstance(line, list) and line]
    same = len(lists) == len(value) and len({len(line) for line in lists}) == 1
    return same and all(type(share) in (int, float) and 0 <= share <= 1 for line in lists for share in line)


_FIGURES = records.items(
    records.fields(
        {
            **dict.fromkeys(("title", "note", "x"), records.TEXT),
            "lines": records.leaf("1 to 8 lists of one length of shares of 0 to 1, by name", _is_lines),
        }
    )
)


def read_curves(run_dir: Path) -> list[Chart]:
    """The figures of a run's ``curves.json``; none without that file.

    Raises:
        DataError: the file is not in its format.
    """
    path = run_dir / FILE
    if not path.is_file():
        return []
    figures = records.read_json(path)
    records.check(path, figures, _FIGURES)
    return [share_chart(figure["title"], figure["note"], figure["x"], figure["lines"]) for figure in figures]
