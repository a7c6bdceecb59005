"""The benchmark of the layer: every contender against the loop in float64, and what is made of the seconds."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from mhmoe_vl.benchmarks import ffn, parts
from mhmoe_vl.benchmarks.contenders import BUILDERS, TOLERANCE, Run
from mhmoe_vl.benchmarks.goals import Goal, goal_rows, goal_table, largest, number, quotient
from mhmoe_vl.benchmarks.memory import peak_mib
from mhmoe_vl.benchmarks.one_hot import rank_choices
from mhmoe_vl.benchmarks.opponents import OPPONENTS, NotHere
from mhmoe_vl.benchmarks.sizes import GROUPS, Case, Size
from mhmoe_vl.benchmarks.timing import Spread, interleave, make_clock, ratio, spread
from mhmoe_vl.errors import TrainingError

CPU = torch.device("cpu")
TINY = Size(tokens=24, dim=64, num_experts=4, hidden_dim=48)


def run(contender: str, dtype: torch.dtype = torch.float32, size: Size = TINY) -> Run:
    return Run(Case(contender, contender, size), dtype, CPU)


# ------------------------------------------------------------------------------------------- contenders
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("contender", BUILDERS)
def test_every_contender_gives_the_loops_numbers(contender, dtype):
    assert run(contender, dtype).error() <= TOLERANCE[dtype]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_loop_without_biases(activation):
    assert run("mh_moe", size=replace(TINY, activation=activation, bias=False)).error() <= 1e-5


@pytest.mark.parametrize("name", ["fc1_weight", "fc2_bias", "fc1_bias", "fc2_weight"])
def test_a_wrong_gradient_is_seen(name):
    wrong = run("mh_moe")
    getattr(wrong.contender.layer.routed.experts, name).register_hook(lambda grad: 1.001 * grad)
    assert wrong.error() == pytest.approx(1e-3, rel=0.1)
    with pytest.raises(TrainingError, match=r"error .* against the loop"):
        ffn.checked(wrong, Case("mh_moe", "mh_moe", TINY))


def test_a_contender_that_does_not_repeat_is_refused():
    class Shaky(Run):
        def forward_backward(self):
            y, grads = super().forward_backward()
            return y + 1e-7 * torch.randn_like(y), grads

    with pytest.raises(TrainingError, match="different bits"):
        ffn.checked(Shaky(Case("mh_moe", "mh_moe", TINY), torch.float32, CPU), Case("mh_moe", "mh_moe", TINY))


def test_one_hot_drops_beyond_capacity():
    """Rank of a choice among those of its expert; first choices count before second ones."""
    assert rank_choices(torch.tensor([[0, 1], [0, 2], [1, 0]]), 3).tolist() == [[0, 1], [1, 0], [0, 2]]
    contender = run("one_hot", size=replace(TINY, tokens=6)).contender
    with torch.no_grad():  # every sub-token to the same two experts
        contender.mixer.router.zero_()[:2] = 1.0
        rows = contender.mixer(torch.ones(24, 16))[0]
    assert contender.mixer.kept.sum(0).tolist() == [12, 12]
    assert torch.count_nonzero(rows.abs().sum(1)) == 12


def test_skewed_means_half_of_all_choices():
    skewed = run("skewed")
    experts = skewed.contender.choices(skewed.x)["experts"]
    assert (experts == 0).float().mean() == 0.5


def test_thick_and_thin_have_the_products_of_the_layer():
    """Multiply-adds of the experts: rows times two matrices, the same number three times."""
    layer = run("mh_moe").contender.layer
    rows = TINY.tokens * TINY.num_subtokens * TINY.top_k
    sparse = rows * 2 * layer.routed.experts.dim * layer.routed.experts.hidden_dim
    for name, pieces in (("thick", 1), ("thin", TINY.num_subtokens)):
        dense = run(name).contender
        matrices = dense.fc1.weight.numel() + dense.fc2.weight.numel()
        assert TINY.tokens * pieces * TINY.top_k * matrices == sparse


@pytest.mark.parametrize("name", OPPONENTS)
def test_opponents_are_correct_or_say_how_to_get_them(name):
    size = next(case.size for case in GROUPS["opponents"] if case.contender == name)
    try:
        found = run(name, size=replace(TINY, activation=size.activation, bias=size.bias))
    except NotHere as reason:
        assert "pip install" in str(reason) or "GPU" in str(reason)
        return
    assert found.error() <= 1e-4


def test_an_opponent_of_another_version_is_left_out(monkeypatch):
    def fail(*given, **options):
        raise TypeError("unknown option")

    monkeypatch.setitem(OPPONENTS, "transformers", fail)
    with pytest.raises(NotHere, match="TypeError: unknown option"):
        run("transformers")


# ------------------------------------------------------------------------------------- seconds and parts
def test_contenders_take_turns():
    calls, ticks = [], iter(range(1000))
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = interleave(runs, 3, lambda: next(ticks), warmup=1)
    assert calls == [*"cab", *"abc", *"bca", *"cab"]
    assert seconds == {name: [1, 1, 1] for name in "abc"}
    assert spread([1.0, 2.0, 3.0, 4.0, 100.0]) == Spread(2.0, 3.0, 4.0)
    assert ratio([2.0, 8.0], [1.0, 2.0]).median == 3.0
    assert make_clock("cpu", CPU)() >= 0


def test_profile_puts_every_operator_into_a_part():
    layer = parts.profile_parts(run("mh_moe"), rounds=1)
    assert tuple(layer) == parts.PARTS
    assert all(milliseconds > 0 for milliseconds in layer.values())
    dense = parts.profile_parts(run("thin"), rounds=1)
    assert {name for name, milliseconds in dense.items() if milliseconds} == {
        "linear layers",
        "matmul",
        "activation",
        "bias",
        "other",
    }
    assert parts.overhead({"router": 1, "sort": 1, "permute": 1, "combine": 1, "matmul": 6}) == 0.4


def test_profile_finds_the_backward_pass_by_the_names_that_torch_gives():
    layer = run("mh_moe")
    assert parts.profile_parts(layer, rounds=1)["activation"] > 0
    with torch.profiler.profile() as profiler:
        layer.forward_backward()
    names = {event.name for event in profiler.events()}
    assert any(name.startswith("autograd::engine::evaluate_function") for name in names), "what parts.py looks for"


def test_peak_memory_counts_what_a_pass_holds():
    """Hidden activations before and after GELU, and their gradients, must be there: at least two of them at once."""
    case = Case("thin", "thin", Size(tokens=800, dim=64, num_subtokens=4, hidden_dim=512))
    hidden = 800 * 4 * 2 * 512 * 4 / 2**20
    assert 2 * hidden < peak_mib(case, torch.float32, CPU) < 6 * hidden


# ------------------------------------------------------------------------------------------------ goals
def results(**cases: list[float]) -> dict:
    entries = [{"name": name, "forward_backward": seconds} for name, seconds in cases.items()]
    return {"groups": [{"group": "g", "dtype": "float32", "cases": entries}], "share": {"a": 0.1}}


@pytest.mark.parametrize(
    ("mine", "verdict"), [(1.0, "met, stretch too"), (1.1, "met, stretch too"), (1.15, "met"), (1.3, "not met")]
)
def test_goals_are_judged_by_the_median_quotient(mine, verdict):
    goal = Goal(1, "it", 1.2, 1.1, quotient("g", "float32", "a", "b"))
    [row] = goal_rows([goal], results(a=[9.0 * 2, mine * 2, mine * 2], b=[2.0, 2.0, 2.0]))
    assert (row["verdict"], row["measured"][1]) == (verdict, pytest.approx(mine))


def test_goals_the_other_way_round_and_unmeasured():
    goals = [
        Goal(12, "more", 1.7, 2.2, quotient("g", "float32", "a", "b"), at_least=True),
        Goal(2, "gone", 1.0, 0.5, quotient("g", "bfloat16", "a", "b"), unless="no bfloat16 here"),
        Goal(8, "share", 0.12, 0.08, number("share", "a")),
        Goal(15, "worst", 3.0, 2.0, largest(quotient("g", "float32", "a", "b"), quotient("g", "float32", "b", "a"))),
    ]
    rows = goal_rows(goals, results(a=[4.0], b=[2.0]))
    assert [row["verdict"] for row in rows] == ["met", "not measured", "met", "met, stretch too"]
    table = goal_table(json.loads(json.dumps(rows))).splitlines()
    assert [cell.strip() for cell in table[2].split("|")[1:-1]] == ["12", "more", ">= 1.7", "2.2", "2", "met"]
    assert "not measured: no bfloat16 here" in table[3]


def test_every_goal_finds_its_cases():
    """A full run measures all: made-up seconds under the names of the groups."""
    cases = {
        name: [{"name": c.name, "forward_backward": [1.0], "peak_mib": [1.0]} for c in members]
        for name, members in GROUPS.items()
    }
    made_up = {
        "groups": [{"group": g, "dtype": d, "cases": cases[g]} for g in GROUPS for d in ("float32", "bfloat16")],
        "overhead": {d: {"mh_moe E8": 0.1} for d in ("float32", "bfloat16")},
        "error": {"float32": 1e-6},
    }
    assert not [row["what"] for row in goal_rows(ffn.GOALS, made_up) if row["measured"] is None]
    assert {goal.number for goal in ffn.GOALS} == {1, 2, 3, 4, 5, 6, 7, 8, 9, 14, 15}


def test_the_tool_prints_tables_and_writes_json(tool, monkeypatch, tmp_path, capsys):
    tiny = [Case("mh_moe E8", "mh_moe", TINY), Case("thick", "thick", TINY), Case("tutel", "torchscale_tutel", TINY)]
    monkeypatch.setitem(GROUPS, "base", tiny)
    monkeypatch.setitem(OPPONENTS, "torchscale_tutel", absent)
    out, figure = tmp_path / "a" / "b.json", tmp_path / "parts.svg"
    options = ["--sizes", "base", "--rounds", "2", "--threads", "1", "--clock", "cpu", "--dtype", "float32"]
    assert tool("benchmark_ffn", *options, "--json", out, "--figure", figure) == 0
    printed = capsys.readouterr().out
    assert "skipped tutel: tutel is missing" in printed
    assert "| router" in printed and "met" in printed
    found = json.loads(out.read_text())
    assert [case["name"] for case in found["groups"][0]["cases"]] == ["mh_moe E8", "thick"]
    assert found["goals"][0]["measured"] and figure.read_text().startswith("<?xml")


def absent(*given, **options):
    raise NotHere("tutel is missing: pip install tutel")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sizes", "huge"], "invalid choice: 'huge'"),
        (["--rounds", "0"], "--rounds: 0 is below 1"),
        (["--clock", "cpu"], "add --threads 1"),
        (["--device", "tpu"], "tpu"),
        (["--sizes", "base", "--json", "setup.cfg/a.json"], "--json: setup.cfg/a.json"),
    ],
)
def test_mistakes_are_one_line(tool, capsys, monkeypatch, arguments, words):
    monkeypatch.setitem(GROUPS, "base", [])
    monkeypatch.setattr(ffn, "measure", lambda *given, **options: {"groups": [], "parts": {}})
    assert tool("benchmark_ffn", *arguments) == 2
    assert words in capsys.readouterr().err


def test_figure_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(parts.ConfigError, match="pip install"):
        parts.draw({"a": dict.fromkeys(parts.PARTS, 1.0)}, tmp_path / "a.svg")
