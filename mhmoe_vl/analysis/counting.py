"""What is counted of a trace: whole numbers that add up over traces, and tokens with their labels."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import pairwise

import numpy as np

from .labels import Labels
from .token_sample import LABEL
from .trace import PARTS, LayerTrace, RoutingTrace

GROUPS = ("class", "patch", "special", "word", "listed")
"""Kinds of tokens whose divergence is counted apart: class tokens, patches, begin and end of text, other text, and
text tokens of the words that were listed."""
NATS = 2**20
"""Entropies are summed in whole units of 1 / 2^20 nats."""

Counts = dict[str, np.ndarray]


def count_trace(trace: RoutingTrace, labels: Labels | None = None, words: Collection[str] = ()) -> Counts:
    """Counts of one trace, int64 arrays by name.

    ``samples``: images, texts, pairs. By pool of experts: ``choices/POOL`` and ``dropped/POOL`` (3, E) by part,
    ``tokens/POOL`` and ``entropy/POOL`` (3,) by part, ``together/POOL`` (E, E). By two pools of neighbouring layers:
    ``transitions/LOWER>UPPER`` (E, E). ``divergence``: (groups, bins), tokens by their distinct experts summed over
    layers. ``word/WORD``: (2,) tokens of a listed word, and the sum of that over them.

    Args:
        trace: to count.
        labels: of its samples; without them all text tokens are in the group ``word``.
        words: listed words.
    """
    counts: Counts = {"samples": np.array([trace.num_images, trace.num_texts, trace.num_pairs], np.int64)}
    for layer in trace.layers:
        counts |= _layer_counts(layer)
    for lower, upper in _neighbours(trace):
        if (table := _transitions(lower, upper)).any():
            counts[f"transitions/{lower.name}>{upper.name}"] = table
    return counts | _divergence(trace, labels, words)


def _layer_counts(layer: LayerTrace) -> Counts:
    E, name = layer.num_experts, layer.name
    counts = {
        f"choices/{name}": np.stack([layer.counts(part) for part in PARTS]),
        f"dropped/{name}": np.zeros((len(PARTS), E), np.int64),
        f"tokens/{name}": np.zeros(len(PARTS), np.int64),
        f"entropy/{name}": np.zeros(len(PARTS), np.int64),
        f"together/{name}": np.zeros((E, E), np.int64),
    }
    for number, part in enumerate(PARTS):
        if part not in layer.parts:
            continue
        found = layer.parts[part]
        experts, kept, entropy = (x[found.counted] for x in (found.experts, found.kept, found.entropy))
        counts[f"dropped/{name}"][number] = np.bincount(experts[~kept], minlength=E)
        counts[f"tokens/{name}"][number] = len(experts)
        counts[f"entropy/{name}"][number] = np.rint(entropy.astype(np.float64) * NATS).astype(np.int64).sum()
        counts[f"together/{name}"] += _together(experts, E)
    return counts


def _together(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """(E, E) pairs of choices by different sub-tokens of one token: all pairs, less those of a sub-token by itself."""
    of_subtoken = _times_chosen(experts.reshape(-1, experts.shape[-1]), num_experts)
    of_token = of_subtoken.reshape(*experts.shape[:2], num_experts).sum(1)
    return (of_token.T @ of_token - of_subtoken.T @ of_subtoken).astype(np.int64)


def _neighbours(trace: RoutingTrace) -> Iterator[tuple[LayerTrace, LayerTrace]]:
    """Pools of each layer of experts, with those of the next one above."""
    by_block: dict[int, list[LayerTrace]] = {}
    for layer in trace.layers:
        by_block.setdefault(layer.block, []).append(layer)
    for lower, upper in pairwise(by_block.values()):
        yield from ((a, b) for a in lower for b in upper)


def _transitions(lower: LayerTrace, upper: LayerTrace) -> np.ndarray:
    """(E, E) pairs of a choice below and a choice above by the same token."""
    table = np.zeros((lower.num_experts, upper.num_experts))
    for part in lower.parts.keys() & upper.parts.keys():
        a, b = lower.parts[part], upper.parts[part]
        both = a.counted & b.counted
        below, above = (x.experts[both].reshape(np.count_nonzero(both), -1) for x in (a, b))
        table += _times_chosen(below, lower.num_experts).T @ _times_chosen(above, upper.num_experts)
    return table.astype(np.int64)


def _times_chosen(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """(n, E) float64: how often each row of (n, J) names each expert. Products of floats are fast, and these are exact
    far beyond what a batch holds."""
    flat = experts.astype(np.int64) + np.arange(len(experts))[:, None] * num_experts
    counts = np.bincount(flat.ravel(), minlength=len(experts) * num_experts)
    return counts.reshape(len(experts), num_experts).astype(np.float64)


def divergence_bins(num_blocks: int, num_experts: int, choices: int) -> int:
    """Values that the distinct experts of a token, summed over layers, can have; ``choices`` are those per token."""
    return num_blocks * min(choices, num_experts) + 1


def _divergence(trace: RoutingTrace, labels: Labels | None, words: Collection[str]) -> Counts:
    layer = trace.layers[0]
    num_blocks = len({layer.block for layer in trace.layers})
    bins = divergence_bins(num_blocks, layer.num_experts, layer.num_subtokens * layer.top_k)
    counts: Counts = {"divergence": np.zeros((len(GROUPS), bins), np.int64)}
    for part in PARTS:
        found = [layer.parts[part] for layer in trace.layers if part in layer.parts]
        if not found:
            continue
        total = sum(tokens.divergence() for tokens in found)
        present = np.logical_or.reduce([tokens.present for tokens in found])
        group = np.full(total.shape, GROUPS.index("word" if part == "text" else part))
        if part == "text" and labels is not None:
            listed = present & np.isin(labels.words, list(words))
            group[labels.words == ""] = GROUPS.index("special")
            group[listed] = GROUPS.index("listed")
            counts |= _by_word(labels.words[listed], total[listed])
        flat = np.bincount(group[present] * bins + total[present], minlength=len(GROUPS) * bins)
        counts["divergence"] += flat.reshape(len(GROUPS), bins)
    return counts


def _by_word(words: np.ndarray, total: np.ndarray) -> Counts:
    names, codes = np.unique(words, return_inverse=True)
    sums = np.zeros((len(names), 2), np.int64)
    np.add.at(sums, codes, np.stack([np.ones_like(total), total], 1))
    return {f"word/{name}": row for name, row in zip(names, sums, strict=True)}


def labelled_tokens(trace: RoutingTrace, labels: Labels, pools: Collection[str]) -> dict[str, dict[str, np.ndarray]]:
    """Patches and words of a trace as columns of a :class:`~.token_sample.TokenSample`.

    Returns:
        By ``patch`` and ``text``: ``sample``, ``position``, ``label`` (colour or word), ``class`` and ``choices``
        (n, pools, S K) int16, -1 where a token does not pass a pool.
    """
    given = {
        "patch": (labels.image_samples, labels.image_classes, labels.colours),
        "text": (labels.text_samples, labels.text_classes, labels.words),
    }
    columns = {}
    for part, (samples, classes, names) in given.items():
        layers = {layer.name: layer for layer in trace.layers if part in layer.parts}
        if not layers:
            continue
        present = np.logical_or.reduce([layer.parts[part].present for layer in layers.values()])
        place = np.nonzero((names != "") & present)
        each = next(iter(layers.values()))
        absent = np.full((len(place[0]), each.num_subtokens * each.top_k), -1, np.int16)
        chosen = [
            layers[pool].parts[part].experts[place].reshape(absent.shape) if pool in layers else absent
            for pool in pools
        ]
        columns[part] = {
            "sample": samples[place[0]],
            "position": place[1],
            "label": names[place].astype(LABEL),
            "class": classes[place[0]].astype(LABEL),
            "choices": np.stack(chosen, 1),
        }
    return columns
