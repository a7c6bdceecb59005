"""Perplexity of runs, from logs written by hand."""

from __future__ import annotations

import json

import pytest

from mhmoe_vl.analysis.run_figures import expert_points, perplexity_by_experts, perplexity_curves, plot_runs, read_run
from mhmoe_vl.errors import ConfigError, DataError

MH_MOE = {"kind": "mh_moe", "num_experts": 8, "num_subtokens": 4, "top_k": 2, "router": {"kind": "linear"}}
XMOE = {"kind": "moe", "num_experts": 8, "top_k": 1, "router": {"kind": "cosine"}}


def run(folder, ffn, values, metric="perplexity"):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"encoder": {"ffn": ffn}}))
    lines = [{"step": 10 * i, "split": "val", metric: value} for i, value in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_run(folder)


@pytest.fixture
def runs(tmp_path):
    return [
        run(tmp_path / "a", MH_MOE, [90, 30, 20]),
        run(tmp_path / "b", MH_MOE | {"num_experts": 32}, [90, 20, 10]),
        run(tmp_path / "c", MH_MOE, [80, 40, 26, None]),
        run(tmp_path / "d $x$", XMOE, [70, 35]),
        run(tmp_path / "e", {"kind": "dense"}, [60, 50]),
    ]


def test_layers_are_named_by_what_differs(runs):
    assert [each.layer for each in runs] == ["mh_moe h4 top-2"] * 3 + ["moe cosine top-1", "dense"]
    assert [each.num_experts for each in runs] == [8, 32, 8, 8, None]


def test_curves(runs):
    [ax] = perplexity_curves(runs).axes
    assert [list(map(list, line.get_data())) for line in ax.get_lines()[:2]] == [
        [[0, 10, 20], [90, 30, 20]],
        [[0, 10, 20], [90, 20, 10]],
    ]
    assert ax.get_yscale() == "log" and ax.get_ylabel() == "validation perplexity"
    assert "d $x$ (moe cosine top-1): 35" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_points_against_experts(runs):
    assert expert_points(runs, "perplexity") == {
        "dense": {0: [50]},
        "mh_moe h4 top-2": {8: [20, 26], 32: [10]},
        "moe cosine top-1": {8: [35]},
    }
    [ax] = perplexity_by_experts(runs).axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["8", "32"]
    line = next(line for line in ax.get_lines() if list(line.get_xdata()) == [8, 32])
    assert list(line.get_ydata()) == [23, 10]
    with pytest.raises(ConfigError, match="no run with experts"):
        perplexity_by_experts(runs[-1:])


def test_files(tmp_path, runs, capsys):
    assert plot_runs([str(tmp_path / "a"), str(tmp_path / "e")], "perplexity", tmp_path / "out") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["perplexity.png", "perplexity_by_experts.png"]
    assert capsys.readouterr().out.splitlines()[0].endswith("perplexity.png")
    assert plot_runs([str(tmp_path / "e")], "perplexity", tmp_path / "dense") == 0
    assert [p.name for p in (tmp_path / "dense").iterdir()] == ["perplexity.png"]


def test_what_is_missing(tmp_path, runs):
    with pytest.raises(DataError, match=r"a: no validation number 'accuracy' .*there are: perplexity"):
        perplexity_curves(runs, "accuracy")
    with pytest.raises(DataError, match=r"none/config\.yaml: missing"):
        plot_runs([str(tmp_path / "none")], "perplexity", tmp_path / "out")
    (tmp_path / "a" / "config.yaml").write_text("encoder: null\n")
    with pytest.raises(DataError, match=r"encoder\.ffn is not set"):
        read_run(tmp_path / "a")
    assert not (tmp_path / "out").exists()
