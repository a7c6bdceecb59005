"""README's section on performance is what the results say."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from mhmoe_vl.benchmarks import ffn, parts
from mhmoe_vl.benchmarks.goals import goal_rows
from mhmoe_vl.benchmarks.readme import END, START
from mhmoe_vl.benchmarks.sizes import Size, default_groups

RESULTS = {
    "tool": "benchmark_ffn",
    "date": "2026-01-02",
    "hardware": "a processor, 2 cores",
    "torch": "2.14",
    "threads": 2,
    "clock": "wall",
    "load_before": 0.1,
    "groups": [
        {
            "group": "base",
            "dtype": "float32",
            "cases": [
                {"name": "mh_moe E8", "forward_backward": [1.25, 1.25]},
                {"name": "thick", "forward_backward": [1.0, 1.0]},
            ],
        }
    ],
    "overhead": {},
    "error": {},
    "parts": {"float32 mh_moe E8": dict.fromkeys(parts.PARTS, 1.0)},
}


def test_the_section_is_written_between_its_marks(tool, tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "a.json"
    readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    results.write_text(json.dumps(RESULTS | {"goals": goal_rows(ffn.GOALS, RESULTS)}))
    for _ in range(2):  # writing again changes nothing
        assert tool("write_performance", results, "--readme", readme) == 0
        text = readme.read_text()
        assert text.startswith(f"before\n{START}\n") and text.endswith(f"{END}\nafter\n") and "old" not in text
        assert "a processor, 2 cores, torch 2.14, 2 threads, wall time, 2026-01-02, load 0.1" in text
        [row] = [line for line in text.splitlines() if line.startswith("| 1 ")]
        assert [cell.strip() for cell in row.split("|")[3:7]] == ["<= 1.35", "1.2", "1.25", "met"]
        assert "1.0 (11%)" in text


def test_an_accelerators_numbers_stand_beside_its_ceilings(tool, tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "a.json"
    readme.write_text(f"{START}\n{END}")
    seconds = {
        "forward": [0.5],
        "forward_backward": [1.5],
        "device_alone": [1.0],
        "peak_mib": [3.0],
        "error": 0.0,
        "size": asdict(Size()),
    }
    group = {"group": "device", "dtype": "bfloat16", "cases": [{"name": "thick", **seconds}], "skipped": []}
    ceilings = {"copy": 3e12, "matmul": 4 * 3 * 2 * (1576 * 4 * 2 * 2 * 192 * 768 + 2 * 1576 * 768**2)}
    measured = RESULTS | {"groups": [group], "goals": [], "ceilings": ceilings}
    results.write_text(json.dumps(measured))
    assert tool("write_performance", results, "--readme", readme) == 0
    [row] = [line for line in readme.read_text().splitlines() if line.startswith("| thick ")]
    assert [cell.strip() for cell in row.split("|")[1:-1]][-1] == "25%", "of the ceiling of products"
    assert "copy 3.00 TB/s" in readme.read_text()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tool": 3}', '{"tool": "x", "goals": [{}]}'])
def test_other_files_are_refused(tool, tmp_path, capsys, content):
    (tmp_path / "a.json").write_text(content)
    assert tool("write_performance", tmp_path / "a.json") == 2
    assert "not the JSON of a benchmark" in capsys.readouterr().err


def test_a_readme_without_marks_is_left_alone(tool, tmp_path, capsys):
    readme, results = tmp_path / "README.md", tmp_path / "a.json"
    readme.write_text(f"{END} {START}")
    results.write_text(json.dumps(RESULTS | {"goals": []}))
    assert tool("write_performance", results, "--readme", readme) == 2
    assert "put them back" in capsys.readouterr().err
    assert readme.read_text() == f"{END} {START}"


def test_our_readme_has_the_marks():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    assert text.count(START) == text.count(END) == 1


def test_what_is_measured_where():
    assert "base" in default_groups("cpu") and "device" not in default_groups("cpu")
    assert default_groups("cuda") == ["device", "device_wide"]
