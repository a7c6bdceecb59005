"""Curves of shares over shares: places worked out by hand, and files that are none."""

from __future__ import annotations

import json

import pytest

from mhmoe_vl.analysis.charts import share_chart
from mhmoe_vl.analysis.curves import read_curves, write_curves
from mhmoe_vl.errors import DataError

FIGURE = {"title": "Precision", "note": "by hand", "x": "recall", "lines": {"a": [1.0, 0.5, 0.0], "b": [0, 1, 1]}}


def test_values_stand_where_they_should():
    chart = share_chart(FIGURE["title"], FIGURE["note"], FIGURE["x"], FIGURE["lines"])
    assert [curve.line for curve in chart.curves] == [["60,10 260,110 460,210"], ["60,210 260,10 460,10"]]
    assert chart.x_ticks[0] == (60, "0") and chart.x_ticks[-1] == (460, "1")
    assert chart.y_ticks[0] == (210, "0") and chart.y_ticks[-1] == (10, "1")
    assert chart.table.columns == ["recall", "a", "b"]
    assert chart.table.rows == [["0", "1", "0"], ["0.5", "0.5", "1"], ["1", "0", "1"]]
    assert [readout.rows[0] for readout in chart.readouts] == [
        (-1, "recall 0", ""), (-1, "recall 0.5", ""), (-1, "recall 1", ""),
    ]  # fmt: skip


def test_figures_are_read_as_they_were_written(tmp_path):
    assert read_curves(tmp_path) == []
    write_curves(tmp_path, [FIGURE])
    [chart] = read_curves(tmp_path)
    assert (chart.title, chart.note, [curve.label for curve in chart.curves]) == ("Precision", "by hand", ["a", "b"])


@pytest.mark.parametrize(
    "change",
    [
        {"lines": {}}, {"lines": {"a": []}}, {"lines": {"a": [0.5, 1.5]}}, {"lines": {"a": [0.5], "b": [0.5, 0.5]}},
        {"lines": {"a": [None]}}, {"lines": {str(i): [1] for i in range(9)}}, {"lines": [[1]]}, {"title": 3},
        {"x": None},
    ],
)  # fmt: skip
def test_files_that_are_none_are_refused(tmp_path, change):
    (tmp_path / "curves.json").write_text(json.dumps([FIGURE | change]))
    with pytest.raises(DataError, match=r"curves\.json: \[0\]"):
        read_curves(tmp_path)
