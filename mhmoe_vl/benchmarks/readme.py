"""README's section on performance, from the benchmarks' JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, one_line
from . import ffn, goals, parts, training
from .machine import heading

START, END = "<!-- performance: written by tools/write_performance.py -->", "<!-- end of performance -->"


def section(paths: Sequence[Path]) -> str:
    """The machine, the goals and the profile by part of every result file; of an accelerator all groups, of a CPU that
    with other libraries' layers.

    Raises:
        DataError: a file is not one that a benchmark wrote.
    """
    return "\n\n".join(_shown(path) for path in paths)


def _shown(path: Path) -> str:
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        tables = [f"`tools/{results['tool']}.py`: {heading(results)}.", goals.goal_table(results["goals"])]
        if results.get("parts"):
            tables.append(parts.table(results["parts"]))
        shown = [group for group in results["groups"] if "ceilings" in results or group["group"] == "opponents"]
        tables[1:1] = [_group_table(group, results) for group in shown]
        return "\n\n".join(tables)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        what = one_line(getattr(error, "strerror", None) or f"{type(error).__name__}: {error}", 120)
        raise DataError(f"{path}: not the JSON of a benchmark: {what} (name what --json wrote)") from error


def _group_table(group: dict[str, Any], results: dict[str, Any]) -> str:
    if results["tool"] == "benchmark_ffn":
        return ffn.group_table(group, results.get("ceilings"))
    return training.group_table(group, results)


def replace_section(text: str, new: str, name: str, start: str = START, end: str = END) -> str:
    """``text`` with ``new`` between two marks.

    Raises:
        DataError: the marks are not there, each once and in order.
    """
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed) or start in after or end in after:
        raise DataError(f"{name}: has not once {start!r} and then {end!r} (put them back)")
    return f"{before}{start}\n{new}\n{end}{after}"
