"""Geometry of the report's figures, against places worked out by hand."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mhmoe_vl.analysis.charts import (
    Series,
    compact,
    line_chart,
    log_ticks,
    nice_ticks,
    pick,
    pool_chart,
    smooth,
    thin,
    y_axis,
)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.0, 4.0, [1, 2, 3, 4]),
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-3.0, 7.0, [-4, -2, 0, 2, 4, 6, 8]),
        (0.0, 0.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.001, 0.003, [0.001, 0.0015, 0.002, 0.0025, 0.003]),
    ],
)
def test_nice_ticks(low, high, expected):
    assert nice_ticks(low, high) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (10.0, 1000.0, [10, 20, 50, 100, 200, 500, 1000]),
        (31.0, 8192.0, [10, 100, 1000, 10000]),
        (30.0, 40.0, [30, 32, 34, 36, 38, 40]),
    ],
)
def test_log_ticks(low, high, expected):
    assert log_ticks(low, high) == expected


numbers = st.floats(-1e99, 1e99, allow_subnormal=False)


@given(st.lists(numbers | st.just(math.nan) | st.just(math.inf), max_size=6), st.booleans())
def test_an_axis_holds_its_values(values, log):
    axis = y_axis(values, log)
    places = [axis.place(value) for value in values if math.isfinite(value)]
    assert all(-1e-6 <= place <= 1 + 1e-6 for place in places)
    assert 1 <= len(axis.ticks) <= 13 and axis.low < axis.high


def test_lines_stand_at_the_places_worked_out_by_hand():
    chart = line_chart("loss", {"loss": Series([10, 20, 30], [4.0, 2.0, 1.0])})
    assert chart.curves[0].line == ["60,10 260,143.3 460,210"]
    assert chart.curves[0].raw == []
    assert chart.y_ticks == [(210.0, "1"), (143.3, "2"), (76.7, "3"), (10.0, "4")]
    assert chart.x_ticks == [(60.0, "10"), (160.0, "15"), (260.0, "20"), (360.0, "25"), (460.0, "30")]


def test_a_logarithmic_axis_places_by_ratio():
    chart = line_chart("p", {"p": Series([0, 50, 100], [1000.0, 100.0, 10.0])}, log=True)
    assert chart.curves[0].line == ["60,10 260,110 460,210"]
    assert chart.note == "logarithmic axis"
    assert line_chart("p", {"p": Series([0, 50], [0.0, 100.0])}, log=True).note == ""  # zero has no logarithm


def test_gaps_break_the_line_and_points_alone_become_dots():
    chart = line_chart("loss", {"loss": Series([0, 1, 2, 3, 4], [0.0, 1.0, math.nan, 1.0, math.inf])})
    assert chart.curves[0].line == ["60,210 160,10", "360,10 360,10"]
    assert [row[1] for row in chart.table.rows] == ["0", "1", "nan", "1", "inf"]


def test_one_step_alone_is_drawn():
    assert line_chart("p", {"p": Series([0], [5.0])}).curves[0].line == ["60,110 60,110"]


def test_smoothing_is_the_weighted_mean_of_what_came_before():
    values = [4.0, 2.0, math.nan, 8.0]
    slow = [sum(v * 0.5**i for i, v in enumerate(part[::-1])) / sum(0.5**i for i in range(len(part)))
            for part in ([4.0], [4.0, 2.0], [4.0, 2.0, 8.0])]  # fmt: skip
    smoothed = smooth(values, 2)
    assert [smoothed[0], smoothed[1], smoothed[3]] == pytest.approx(slow)
    assert math.isnan(smoothed[2])


def test_long_runs_keep_their_spikes_and_ends():
    values = [1.0] * 10_000
    values[4321], values[7777] = 50.0, -50.0
    kept = thin(values)
    assert {0, 4321, 7777, 9999} <= set(kept) and kept == sorted(kept) and len(kept) <= 602
    chart = line_chart("loss", {"loss": Series(list(range(10_000)), values)}, smoothed=True)
    assert chart.curves[0].raw and chart.note == "bold: mean over about 400 log lines"
    assert len(chart.readouts) == 60 and len(chart.table.rows) == 200
    assert chart.table.note == "200 of 10,000 rows; all stand in metrics.jsonl"


@given(st.integers(0, 500), st.integers(2, 50))
def test_pick_keeps_the_ends(count, limit):
    picked = pick(count, limit)
    assert len(picked) == min(count, limit) == len(set(picked))
    assert not count or (picked[0], picked[-1]) == (0, count - 1)


def test_readouts_cover_the_plot_without_overlap():
    chart = line_chart("a", {"x": Series([0, 10, 40], [1.0, 2.0, 3.0]), "y": Series([10], [7.0])})
    assert [r.strip for r in chart.readouts] == [(60, 50.0), (110.0, 200.0), (310.0, 150.0)]
    assert [r.x for r in chart.readouts] == [60.0, 160.0, 460.0]
    assert chart.readouts[1].rows == [(-1, "step 10", ""), (1, "x", "2"), (2, "y", "7")]
    assert chart.table.rows == [["0", "1", ""], ["10", "2", "7"], ["40", "3", ""]]


def test_the_main_line_has_the_colour_of_text():
    chart = line_chart("loss", {"loss": Series([0], [1.0]), "image": Series([0], [2.0])}, main="loss")
    assert [curve.color for curve in chart.curves] == [0, 1]
    assert line_chart("lr", {"lr": Series([0], [1.0])}, main="lr").curves[0].color == 1


def test_compact():
    assert [compact(v) for v in (0, 0.5, 9999, 20_000, 1_500_000)] == ["0", "0.5", "9999", "20k", "1.5M"]


def test_pool_pictures_and_bars():
    load = np.array([[0.5, 0.25, 0.25, 0.0], [0.25, 0.5, 0.25, 0.0]])
    by_stream = np.array([[[1.0, 0, 0, 0], [0, 0.5, 0.5, 0]], [[2.0, 2, 0, 0], [0, 0, 0, 0]]])
    pool = pool_chart("pool", [10, 20], load, by_stream)
    picture = Image.open(io.BytesIO(base64.b64decode(pool.picture.partition(",")[2])))
    assert picture.size == (2, 4)  # steps to the right, experts down
    pixels = np.asarray(picture.convert("RGB"))
    assert pixels[0, 0].tolist() == [253, 231, 37] and pixels[1, 1].tolist() == [253, 231, 37]  # twice the even share
    assert np.abs(pixels[2, 0].astype(int) - [33, 145, 140]).max() <= 2  # the even share
    assert pixels[3].tolist() == [[213, 94, 0]] * 2  # none
    # The last tenth of two lines is the second: 18 units a row, 125 units for the largest share, 0.5.
    assert pool.height == 72 and pool.dead == [3] and pool.bar_end == "50.0 %"
    assert pool.bars[0].startswith("M345,11.8h125.0v7.2h-125.0zM345,29.8h125.0v7.2h-125.0zM345,47.8h0.0")
    assert pool.bars[1].startswith("M345,19.0h0.0v7.2")
    assert pool.ticks == "M407.5,10.0v18.0M470.0,28.0v18.0M407.5,46.0v18.0M345.0,64.0v18.0"
    assert pool.dead_marks == "M348,70.0l6,6m0,-6l-6,6" and pool.even == 407.5
    assert pool.rows[0] == (10.0, "expert 0: 25.0 %, image 50.0 %, text 0.0 %, was 25.0 % to 50.0 %")
    assert pool.table.columns == ["expert", "step 10", "step 20", "last tenth", "image", "text"]
    assert pool.table.rows[0] == ["0", "0.5", "0.25", "0.25", "0.5", "0"]


def test_pools_without_streams_draw_the_load_itself():
    pool = pool_chart("pool", [1], np.array([[0.75, 0.25]]), None)
    assert pool.bars == ["M345,11.8h125.0v14.4h-125.0zM345,29.8h41.7v14.4h-41.7z"]
    assert pool.table.rows == [["0", "0.75", "0.75"], ["1", "0.25", "0.25"]]
