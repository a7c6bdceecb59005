"""Figures of expert activation: each function takes counts, or a trace, and returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import ConfigError
from .activation import LABELS, SHARES, Activation
from .plotting import COLORS, DIVERGING, MARKERS, SEQUENTIAL, drawn, heat, panels, shown, whole_ticks
from .specialisation import mutual_information
from .trace import PARTS, RoutingTrace

Counted = Activation | RoutingTrace
"""What a figure of activation can be drawn from."""
LIFT_LIMIT = 2.0
"""Factors are shown from 1/4 to 4 as 2 to the power of -2 to 2; beyond, the colour stays."""
CURVE_POINTS = 400


def _counts(counted: Counted) -> Activation:
    return Activation.of_traces([counted]) if isinstance(counted, RoutingTrace) else counted


def _all_counts(models: Mapping[str, Counted]) -> dict[str, Activation]:
    if not models:
        raise ConfigError("figure: no model to draw (give one with layers of experts)")
    return {name: _counts(counted) for name, counted in models.items()}


def pool_label(name: str) -> str:
    """``blocks.3.joint`` as ``block 3``; other pools keep their kind."""
    _, block, pool = name.split(".")
    return f"block {block}" if pool == "joint" else f"block {block} {pool}"


def _size(activation: Activation) -> str:
    split = f", {activation.num_subtokens} sub-tokens" if activation.num_subtokens > 1 else ""
    return f"{activation.num_experts} experts, top-{activation.top_k}{split}"


@drawn
def activation_heat_maps(models: Mapping[str, Counted], per: str = "token") -> Any:
    """Layer x expert heat maps, one panel a model, first layer of experts on top (paper 1, figures 1a and 6).

    Args:
        models: counts or traces by name.
        per: what activation is measured by, one of :data:`~.activation.SHARES`. Colours of ``even`` are the same in all
            panels; for the others each panel has its own, from 0.
    """
    counts = _all_counts(models)
    width = 3.1 if len(counts) > 1 else 6.2
    rows = max(len(a.used) for a in counts.values())
    figure, axes = panels(len(counts), width, 1.5 + 0.22 * rows, most=3)
    label = {"token": "choices / tokens", "row": "choices / routed rows", "even": "choices / even share"}[per]
    for ax, (name, activation) in zip(axes, counts.items(), strict=True):
        values = np.stack([activation.shares(pool, per) for pool in activation.used])
        top = 2.0 if per == "even" else max(values.max(), 1e-9)
        names = [pool_label(pool) for pool in activation.used]
        heat(ax, values, names, label, cmap=SEQUENTIAL, vmin=0, vmax=top)
        ax.set_title(f"{shown(name)}\n{_size(activation)}")
        ax.set_xlabel("expert")
    figure.suptitle(f"Expert activation: {SHARES[per]}", fontsize=9)
    return figure


@drawn
def activated_share(models: Mapping[str, Counted]) -> Any:
    """Share of all experts of all layers whose activation is above a threshold, as curves over the threshold.

    One panel for each definition of :data:`~.activation.SHARES`, which stands on it. The papers state no threshold.
    """
    counts = _all_counts(models)
    figure, axes = panels(len(SHARES), 3.3, 3.1, most=3)
    for ax, (per, definition) in zip(axes, SHARES.items(), strict=True):
        highest = max(a.shares(pool, per).max() for a in counts.values() for pool in a.used)
        marks = np.geomspace(1e-3, max(1.1 * highest, 2e-3), CURVE_POINTS)
        for number, (name, activation) in enumerate(counts.items()):
            style = {"color": COLORS[number % len(COLORS)], "linestyle": ("-", "--", ":")[number % 3]}
            share = 100 * activation.activated(marks, per)
            ax.plot(marks, share, label=f"{shown(name, 30)} ({_size(activation)})", **style)
        ax.set_xscale("log")
        ax.set_ylim(-3, 103)
        ax.set_xlabel(f"threshold on\n{definition.replace(' (', chr(10) + '(')}")
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("experts above the threshold, %")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=2 if len(names) > 1 else 1)
    return figure


@drawn
def divergence_histograms(models: Mapping[str, Counted], listed: str = "listed words") -> Any:
    """How many distinct experts the sub-tokens of a token reach: patches, words, and listed words (paper 1, figure 7).

    Args:
        models: counts or traces by name, one panel each.
        listed: name of the list of words, such as polysemous words.
    """
    counts = _all_counts(models)
    figure, axes = panels(len(counts), 4.2, 3.0, most=2)
    kinds = {"patch": "patches", "word": "other words", "listed": shown(listed, 28)}
    for ax, (name, activation) in zip(axes, counts.items(), strict=True):
        steps = np.arange(len(activation.divergence("word"))) / activation.num_blocks
        for number, (group, label) in enumerate(kinds.items()):
            tokens = activation.divergence(group)
            if not tokens.sum():
                continue
            label = "words" if group == "word" and not activation.divergence("listed").sum() else label
            style = {"color": COLORS[number], "linestyle": ("-", "--", "-.")[number]}
            text = f"{label}: {tokens.sum():,}, mean {activation.mean_divergence(group):.2f}"
            ax.step(steps, 100 * tokens / tokens.sum(), where="mid", label=text, **style)
            ax.axvline(activation.mean_divergence(group), linewidth=0.8, alpha=0.7, **style)
        ax.set_title(f"{shown(name)}, {_size(activation)}")
        ax.set_xlabel("distinct experts a token's sub-tokens reach,\nmean over layers")
        ax.set_ylabel("tokens of the kind, %")
        ax.set_ylim(0, ax.get_ylim()[1] * 1.4)
        ax.legend(fontsize=8, loc="upper left")
    return figure


@drawn
def modality_shares(models: Mapping[str, Counted]) -> Any:
    """Which experts take text and which images, layer x expert, one panel a model.

    The value is the expert's rate in text over the sum of its rates in text and images; the rate is its choices over
    the tokens of that modality. So 0.5 takes both alike, however many tokens of each there are.
    """
    counts = _all_counts(models)
    rows = max(len(a.used) for a in counts.values())
    figure, axes = panels(len(counts), 3.1 if len(counts) > 1 else 6.2, 1.5 + 0.22 * rows, most=3)
    for ax, (name, activation) in zip(axes, counts.items(), strict=True):
        values = np.stack([text_preference(activation, pool) for pool in activation.used])
        names = [pool_label(pool) for pool in activation.used]
        heat(ax, values, names, "0 image, 1 text", cmap=DIVERGING, vmin=0, vmax=1)
        ax.set_title(f"{shown(name)}\n{_size(activation)}")
        ax.set_xlabel("expert (hatched: no choices)")
    figure.suptitle("Modality share: choices per text token / (per text token + per image token)", fontsize=9)
    return figure


def text_preference(activation: Activation, pool: str) -> np.ndarray:
    """(E,) rate in text / (rate in text + rate in images), the rate being choices per token; nan without choices."""
    tokens = activation.sums[f"tokens/{pool}"]
    is_text = np.array([part == "text" for part in PARTS])
    rates = [
        activation.choices(pool)[chosen].sum(0) / max(int(tokens[chosen].sum()), 1) for chosen in (is_text, ~is_text)
    ]
    total = sum(rates)
    return np.divide(rates[0], total, out=np.full(len(total), np.nan), where=total > 0)


@drawn
def coactivation(counted: Counted, name: str = "") -> Any:
    """Which experts the sub-tokens of one token reach together, expert x expert, one panel a layer.

    The value is log2 of pairs of choices by two sub-tokens of a token, over the pairs expected if sub-tokens chose
    independently with the same rates.

    Raises:
        ConfigError: tokens are not split.
    """
    activation = _counts(counted)
    if activation.num_subtokens == 1:
        raise ConfigError("coactivation: tokens are not split into sub-tokens (draw it for ffn.kind mh_moe)")
    figure, axes = panels(len(activation.used), 2.9, 2.7, most=3)
    for ax, pool in zip(axes, activation.used, strict=True):
        experts = [str(i) for i in range(activation.num_experts)]
        values = log_lift(activation.together(pool))
        heat(ax, values, experts, "log2(pairs / expected)", cmap=DIVERGING, vmin=-LIFT_LIMIT, vmax=LIFT_LIMIT)
        ax.set_yticks(whole_ticks(activation.num_experts))
        ax.set_title(pool_label(pool))
        ax.set_xlabel("expert of another sub-token")
    axes[0].set_ylabel("expert of a sub-token")
    figure.suptitle(f"Co-activation across the sub-tokens of a token: {shown(name)}", fontsize=9)
    return figure


def log_lift(table: np.ndarray) -> np.ndarray:
    """log2 of counts over what the margins let expect, limited to :data:`LIFT_LIMIT`; nan where none is expected."""
    expected = np.outer(table.sum(1), table.sum(0)) / max(table.sum(), 1)
    lift = np.divide(table, expected, out=np.full(table.shape, np.nan), where=expected > 0)
    return np.log2(np.clip(lift, 2**-LIFT_LIMIT, 2**LIFT_LIMIT))


@drawn
def specialisation(models: Mapping[str, Activation]) -> Any:
    """What the expert says about class, word or patch colour, by layer, beside what shuffled labels give.

    One panel for each label that the data have. Points are mutual information in bits, crosses the mean after shuffling
    (two standard deviations are mostly smaller than the mark).

    Raises:
        ConfigError: no tokens with labels.
    """
    found = {kind: {name: a.specialisation(kind) for name, a in models.items()} for kind in LABELS}
    found = {kind: by_name for kind, by_name in found.items() if any(by_name.values())}
    if not found:
        raise ConfigError("specialisation: no token has a label (add traces with their labels)")
    figure, axes = panels(len(found), 3.4, 3.2, most=3)
    for ax, (kind, by_name) in zip(axes, found.items(), strict=True):
        rows = list(dict.fromkeys(pool for by_pool in by_name.values() for pool in by_pool))
        for number, (name, by_pool) in enumerate(by_name.items()):
            places = [rows.index(pool) + 0.12 * (number - (len(by_name) - 1) / 2) for pool in by_pool]
            style = {"color": COLORS[number % len(COLORS)], "linestyle": "none"}
            bits = [s.bits for s in by_pool.values()]
            ax.plot(places, bits, marker=MARKERS[number % len(MARKERS)], label=shown(name, 30), **style)
            chance = [s.baseline for s in by_pool.values()]
            spread = [2 * s.deviation for s in by_pool.values()]
            ax.errorbar(places, chance, yerr=spread, marker="x", **style)
        ax.set_xticks(range(len(rows)), [pool_label(pool) for pool in rows], rotation=30, ha="right")
        ax.set_xlim(-0.5, len(rows) - 0.5)
        ax.set_ylim(bottom=0)
        ax.set_ylabel(f"I(expert; {kind}), bits")
        ax.set_title(f"{LABELS[kind]} (x: shuffled)")
        ax.grid(alpha=0.25, axis="y")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3)
    return figure


@drawn
def transitions(counted: Counted, name: str = "") -> Any:
    """Where a token that chose an expert goes in the next layer of experts, expert x expert, one panel a step up.

    The value is the share of the choices that its tokens make in the upper layer; each row sums to 1.

    Raises:
        ConfigError: there is one layer only.
    """
    activation = _counts(counted)
    tables = activation.transitions()
    if not tables:
        raise ConfigError("transitions: one layer of experts only, nothing to go to (draw it for a deeper model)")
    figure, axes = panels(len(tables), 2.9, 2.7, most=3)
    for ax, ((lower, upper), table) in zip(axes, tables.items(), strict=True):
        total = table.sum(1, keepdims=True)
        values = np.divide(table, total, out=np.full(table.shape, np.nan), where=total > 0)
        heat(ax, values, [""] * len(values), "share of the row", cmap=SEQUENTIAL, vmin=0)
        ax.set_yticks(whole_ticks(len(values)), map(str, whole_ticks(len(values))))
        ax.set_ylabel(f"expert, {pool_label(lower)}")
        ax.set_xlabel(f"expert, {pool_label(upper)}")
        ax.set_title(f"mutual information {mutual_information(table):.3f} bits")
    figure.suptitle(f"Transitions between layers: {shown(name)}", fontsize=9)
    return figure


@drawn
def divergence_maps(image: np.ndarray, traces: Mapping[str, RoutingTrace], sample: int = 0) -> Any:
    """One picture, and by patch the distinct experts that its sub-tokens reach, mean over layers; one panel a trace
    (paper 1, figures 1b and 11: of the same picture over training steps).

    Args:
        image: (H, W, 3) uint8, as the model saw it.
        traces: by name, such as ``step 1000``; each with this picture. The colours are the same in all panels.
        sample: number of the picture in the traces.
    """
    if not traces or any(trace.grid is None for trace in traces.values()):
        raise ConfigError("divergence_maps: a trace without a picture (trace one with image)")
    maps = {name: trace.divergence("patch")[sample].reshape(trace.grid) for name, trace in traces.items()}
    low, high = min(m.min() for m in maps.values()), max(m.max() for m in maps.values())
    figure, axes = panels(1 + len(maps), 2.2, 2.4, most=5)
    axes[0].imshow(image)
    axes[0].set_title("picture")
    for ax, (name, values) in zip(axes[1:], maps.items(), strict=True):
        drawn_map = ax.imshow(values, cmap=SEQUENTIAL, vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
        ax.set_title(f"{shown(name, 24)}: mean {values.mean():.2f}")
    for ax in axes:
        ax.set_axis_off()
    label = "distinct experts of a patch's\nsub-tokens, mean over layers"
    figure.colorbar(drawn_map, ax=axes[1:], label=label, shrink=0.8)
    return figure
