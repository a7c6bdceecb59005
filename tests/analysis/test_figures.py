"""Figures draw what the counts say, without warnings, whatever models are called."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hand_traces import labels, layer, random_trace, tokens, trace

from mhmoe_vl.analysis import figures, plotting
from mhmoe_vl.analysis.activation import SHARES, Activation
from mhmoe_vl.errors import ConfigError

HOSTILE = "$x_{1}$ \\frac{ <b>猫\n‮"


@pytest.fixture(scope="module")
def split() -> Activation:
    """Two sub-tokens, two choices, six experts, two layers."""
    found, known = random_trace(np.random.default_rng(0), images=4, texts=4)
    activation = Activation(
        ["blocks.1.joint", "blocks.3.joint"], num_experts=6, top_k=2, num_subtokens=2, words=["bank"]
    )
    activation.add(found, known)
    return activation


@pytest.fixture(scope="module")
def whole() -> Activation:
    """Whole tokens, one choice of eight experts, three layers, no labels."""
    found, _ = random_trace(np.random.default_rng(1), experts=8, subtokens=1, top_k=1, blocks=(1, 3, 5))
    return Activation.of_traces([found])


def heat_values(figure, panel: int) -> np.ndarray:
    return np.asarray(figure.axes[panel].images[0].get_array())


def drawn_bytes(figure) -> bytes:
    data = plotting.png(figure)
    assert data.startswith(b"\x89PNG")
    return data


@pytest.mark.parametrize("per", SHARES)
def test_heat_maps_side_by_side(split, whole, per):
    figure = figures.activation_heat_maps({"SMoE": whole, HOSTILE: split}, per)
    drawn_bytes(figure)
    for panel, activation in enumerate((whole, split)):
        assert heat_values(figure, panel) == pytest.approx(
            np.stack([activation.shares(p, per) for p in activation.used])
        )
    assert SHARES[per] in figure.get_suptitle()
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["block 1", "block 3", "block 5"]
    assert figure.axes[0].get_ylim() == (2.5, -0.5)  # the first layer is on top


def test_a_trace_is_drawn_as_it_is(split):
    found, _ = random_trace(np.random.default_rng(2))
    figure = figures.activation_heat_maps({"one": found})
    assert heat_values(figure, 0)[0] == pytest.approx(Activation.of_traces([found]).shares("blocks.1.joint"))


def test_curves_of_the_activated_share_say_their_definition(split, whole):
    figure = figures.activated_share({"SMoE": whole, HOSTILE: split})
    drawn_bytes(figure)
    assert len(figure.axes) == 3
    for ax, (per, definition) in zip(figure.axes, SHARES.items(), strict=True):
        assert ax.get_xlabel().replace("\n", " ") == f"threshold on {definition}"
        for line, activation in zip(ax.get_lines(), (whole, split), strict=True):
            marks, shares = line.get_data()
            assert shares == pytest.approx(100 * activation.activated(marks, per))
            assert shares[0] >= shares[-1] == 0 and np.all(np.diff(shares) <= 0)


def test_divergence_histograms(split, whole):
    figure = figures.divergence_histograms({HOSTILE: split, "SMoE": whole}, "poly$emous.txt")
    drawn_bytes(figure)
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [text.split(":")[0] for text in texts] == ["patches", "other words", "poly$emous.txt"]
    steps, shares = figure.axes[0].get_lines()[0].get_data()
    assert shares.sum() == pytest.approx(100)
    assert (steps * shares).sum() / 100 == pytest.approx(split.mean_divergence("patch"))
    assert [t.get_text().split(":")[0] for t in figure.axes[1].get_legend().get_texts()] == ["patches", "words"]


def test_modality_shares_by_hand():
    """Expert 0: once per image token, once per two text tokens: 1/3; expert 1: text only; expert 2: nothing."""
    found = trace(layer(0, 3, patch=tokens([[[[0]], [[0]]]]), text=tokens([[[[0]], [[1]]]])), grid=(1, 2))
    assert figures.text_preference(Activation.of_traces([found]), "blocks.0.joint")[:2] == pytest.approx([1 / 3, 1])
    figure = figures.modality_shares({"a": found})
    drawn_bytes(figure)
    assert (
        heat_values(figure, 0)[0, :2] == pytest.approx([1 / 3, 1]) and figure.axes[0].images[0].get_array().mask[0, 2]
    )


def test_co_activation(split, whole):
    figure = figures.coactivation(split, HOSTILE)
    drawn_bytes(figure)
    values = heat_values(figure, 0)
    assert values == pytest.approx(values.T) and values.shape == (6, 6)
    with pytest.raises(ConfigError, match="not split"):
        figures.coactivation(whole)


def test_lift_by_hand():
    """Margins 3 and 1 each way expect 9/4, 3/4, 3/4, 1/4."""
    lift = figures.log_lift(np.array([[3, 0], [0, 1]]))
    assert lift.tolist() == [[pytest.approx(np.log2(4 / 3)), -2], [-2, 2]]
    assert np.isnan(figures.log_lift(np.array([[1, 0], [0, 0]]))[1]).all()


def test_specialisation(split, whole):
    figure = figures.specialisation({HOSTILE: split, "SMoE": whole})
    drawn_bytes(figure)
    assert [ax.get_ylabel() for ax in figure.axes] == [f"I(expert; {k}), bits" for k in ("colour", "word", "class")]
    bits = figure.axes[0].get_lines()[0].get_ydata()
    assert list(bits) == [s.bits for s in split.specialisation("colour").values()]
    with pytest.raises(ConfigError, match="no token has a label"):
        figures.specialisation({"SMoE": whole})


def test_transitions(whole, split):
    figure = figures.transitions(whole, HOSTILE)
    drawn_bytes(figure)
    rows = np.nansum(np.ma.filled(figure.axes[0].images[0].get_array(), np.nan), 1)
    assert set(np.round(rows, 9)) <= {0.0, 1.0}
    one = trace(layer(0, 3, patch=tokens([[[[0]], [[0]]]])), grid=(1, 2))
    with pytest.raises(ConfigError, match="one layer"):
        figures.transitions(one)


def test_maps_of_one_picture_over_steps():
    image = np.zeros((4, 4, 3), np.uint8)
    patches = {step: [[[0], [step]], [[1], [1]], [[2], [2]], [[3], [step]]] for step in (0, 1, 3)}
    traces = {
        f"step {step}": trace(layer(0, 4, patch=tokens([experts])), grid=(2, 2)) for step, experts in patches.items()
    }
    figure = figures.divergence_maps(image, traces)
    drawn_bytes(figure)
    maps = [heat_values(figure, panel).tolist() for panel in (1, 2, 3)]
    assert maps == [[[1, 1], [1, 2]], [[2, 1], [1, 2]], [[2, 1], [1, 1]]]
    limits = {figure.axes[panel].images[0].get_clim() for panel in (1, 2, 3)}
    assert limits == {(1, 2)}
    with pytest.raises(ConfigError, match="without a picture"):
        figures.divergence_maps(image, {"a": trace(layer(0, 2, text=tokens([[[[0]]]])))})


def test_nothing_to_draw():
    with pytest.raises(ConfigError, match="no model to draw"):
        figures.activation_heat_maps({})


def test_many_experts_many_layers_and_pools():
    """256 experts in 20 layers, and pools per modality."""
    rng = np.random.default_rng(0)
    layers = [layer(b, 256, patch=tokens(rng.integers(0, 256, (1, 4, 2, 1)))) for b in range(20)]
    deep = trace(*layers, grid=(2, 2))
    apart = trace(
        layer(0, 2, "image", patch=tokens([[[[0]]]])), layer(0, 2, "text", text=tokens([[[[1]]]])), grid=(1, 1)
    )
    drawn_bytes(figures.activation_heat_maps({"deep": deep, "apart": apart}))
    drawn_bytes(figures.modality_shares({"apart": apart}))
    assert figures.pool_label("blocks.0.image") == "block 0 image"


def test_the_same_bytes_every_time(whole):
    first, second = (plotting.png(figures.activation_heat_maps({"a": whole})) for _ in range(2))
    assert first == second


def test_ticks():
    assert plotting.whole_ticks(8) == list(range(8))
    assert plotting.whole_ticks(9) == [0, 2, 4, 6, 8]
    assert plotting.whole_ticks(90) == [0, 20, 40, 60, 80]
    assert plotting.whole_ticks(256) == [0, 50, 100, 150, 200, 250]


def test_without_matplotlib_it_says_what_to_install(monkeypatch, whole):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'mhmoe-vl\[viz\]'"):
        figures.activation_heat_maps({"a": whole})


def test_names_are_shown_as_text():
    assert plotting.shown("$a_1$ 猫\x00") == "$a_1$ ??"
    assert plotting.shown("x" * 99) == "x" * 18 + "..." + "x" * 19
    assert labels().words.shape == (0, 0)
