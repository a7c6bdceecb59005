"""Every count by hand or by plain loops; the same however the samples are cut into batches."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hand_traces import labels, layer, random_trace, tokens, trace

from mhmoe_vl.analysis.activation import SHARES, Activation
from mhmoe_vl.analysis.counting import NATS, count_trace
from mhmoe_vl.analysis.token_sample import TokenSample
from mhmoe_vl.analysis.trace import PARTS, LayerTrace, RoutingTrace


def hand_trace() -> RoutingTrace:
    """One picture of a class token and two patches, one text of two tokens; S = 2, K = 1, E = 3, two layers."""
    low = layer(
        1,
        3,
        **{"class": tokens([[[[0], [0]]]]), "patch": tokens([[[[0], [1]], [[1], [1]]]])},
        text=tokens([[[[2], [0]], [[2], [2]]]]),
    )
    high = layer(
        3,
        3,
        **{"class": tokens([[[[1], [2]]]]), "patch": tokens([[[[0], [2]], [[1], [1]]]])},
        text=tokens([[[[2], [0]], [[0], [1]]]]),
    )
    return trace(low, high, grid=(1, 2), num_pairs=1)


def test_choices_shares_and_thresholds_by_hand():
    activation = Activation.of_traces([hand_trace()])
    low, high = activation.used
    assert (low, high) == ("blocks.1.joint", "blocks.3.joint")
    assert activation.choices(low).tolist() == [[2, 0, 0], [1, 3, 0], [1, 0, 3]]
    assert activation.choices(high).tolist() == [[0, 1, 1], [1, 2, 1], [2, 1, 1]]
    assert activation.num_tokens(low) == 5
    assert activation.shares(low, "token").tolist() == [4 / 5, 3 / 5, 3 / 5]
    assert activation.shares(low, "row").tolist() == [4 / 10, 3 / 10, 3 / 10]
    assert activation.shares(low, "even") == pytest.approx([1.2, 0.9, 0.9])
    for pool in activation.used:  # the definitions' own sums
        assert activation.shares(pool, "token").sum() == pytest.approx(2)
        assert activation.shares(pool, "row").sum() == pytest.approx(1)
        assert activation.shares(pool, "even").mean() == pytest.approx(1)
    # per token: 0.8 0.6 0.6 below, 0.6 0.8 0.6 above
    assert activation.activated([0.5, 0.6, 0.7, 0.8], "token").tolist() == [1, 2 / 6, 2 / 6, 0]
    assert activation.entropy(low) == 0.5
    assert activation.dropped(low) == 0
    share, of_all = activation.text_share(low)
    assert share.tolist() == [1 / 4, 0, 1] and of_all == 4 / 10


def test_divergence_by_hand():
    """Distinct experts, layer by layer: class 1 + 2, patches 2 + 2 and 1 + 1, text 2 + 2 and 1 + 2."""
    activation = Activation.of_traces([hand_trace()])
    assert activation.divergence("class").tolist() == [0, 0, 0, 1, 0]
    assert activation.divergence("patch").tolist() == [0, 0, 1, 0, 1]
    assert activation.divergence("word").tolist() == [0, 0, 0, 1, 1]
    assert activation.divergence("word", "patch").sum() == 4
    assert activation.mean_divergence("patch") == 1.5
    assert activation.mean_divergence("word", "patch") == (4 + 2 + 4 + 3) / 2 / 4
    assert np.isnan(activation.mean_divergence("listed"))


def test_listed_words_by_hand():
    activation = Activation(["blocks.1.joint", "blocks.3.joint"], num_experts=3, top_k=1, num_subtokens=2,
                            words=["gift", "bank", "river"])  # fmt: skip
    activation.add(hand_trace(), labels([["red", "blue"]], [["", "bank"]]))
    activation.add(hand_trace(), labels([["red", "blue"]], [["bank", "gift"]], first=1))
    assert activation.listed_words() == [
        ("bank", 2, (3 + 4) / 2 / 2),
        ("gift", 1, 3 / 2),
        ("river", 0, pytest.approx(float("nan"), nan_ok=True)),
    ]
    assert activation.divergence("listed").tolist() == [0, 0, 0, 2, 1]
    assert activation.divergence("special").tolist() == [0, 0, 0, 0, 1]
    assert activation.divergence("word").sum() == 0


def test_co_activation_and_transitions_by_hand():
    """Sub-tokens below: (0 0) (0 1) (1 1) (2 0) (2 2): each pair counts once in both directions."""
    activation = Activation.of_traces([hand_trace()])
    assert activation.together("blocks.1.joint").tolist() == [[2, 1, 1], [1, 2, 0], [1, 0, 2]]
    [(places, table)] = activation.transitions().items()
    assert places == ("blocks.1.joint", "blocks.3.joint")
    # class: 0 0 -> 1 2; patches 0 1 -> 0 2, 1 1 -> 1 1; text 2 0 -> 2 0, 2 2 -> 0 1
    assert table.tolist() == [[2, 2, 4], [1, 4, 1], [3, 2, 1]]


def slow_counts(found: RoutingTrace) -> dict[str, Counter]:
    """Plain loops over tokens, sub-tokens and choices."""
    counts: dict[str, Counter] = {name: Counter() for name in ("choices", "together", "transitions", "divergence")}
    for part in PARTS:
        layers = [each for each in found.layers if part in each.parts]
        for sample, token in np.argwhere(layers[0].parts[part].present):
            chosen = [each.parts[part].experts[sample, token].tolist() for each in layers]
            total = 0
            for each, rows in zip(layers, chosen, strict=True):
                counts["choices"].update((each.name, PARTS.index(part), e) for row in rows for e in row)
                counts["together"].update(
                    (each.name, i, j) for a, b in itertools.permutations(rows, 2) for i in a for j in b
                )
                total += len({e for row in rows for e in row})
            for lower, upper, a, b in zip(layers, layers[1:], chosen, chosen[1:], strict=False):
                flat = [[e for row in rows for e in row] for rows in (a, b)]
                counts["transitions"].update((lower.name, upper.name, i, j) for i in flat[0] for j in flat[1])
            counts["divergence"][part, total] += 1
    return counts


@pytest.mark.parametrize(
    ("subtokens", "top_k", "blocks"), [(1, 1, (1, 3)), (1, 2, (0,)), (4, 1, (1, 3, 5)), (3, 2, (1, 3))]
)
def test_counts_are_those_of_plain_loops(subtokens, top_k, blocks):
    found, _ = random_trace(np.random.default_rng(top_k), subtokens=subtokens, top_k=top_k, blocks=blocks)
    activation, slow = Activation.of_traces([found]), slow_counts(found)
    for pool in activation.used:
        assert activation.choices(pool).tolist() == [[slow["choices"][pool, p, e] for e in range(6)] for p in range(3)]
        together = activation.together(pool)
        assert together.tolist() == [[slow["together"][pool, i, j] for j in range(6)] for i in range(6)]
        assert np.array_equal(together, together.T)
        rows = activation.num_tokens(pool) * subtokens
        assert together.sum() == rows * (subtokens - 1) * top_k**2
        assert activation.choices(pool).sum() == rows * top_k
    assert len(activation.transitions()) == len(blocks) - 1
    for (lower, upper), table in activation.transitions().items():
        assert table.tolist() == [[slow["transitions"][lower, upper, i, j] for j in range(6)] for i in range(6)]
        assert np.array_equal(table.sum(1), activation.choices(lower).sum(0) * subtokens * top_k)
    for part, group in zip(PARTS, ("class", "patch", "word"), strict=True):
        found_counts = activation.divergence(group)
        assert found_counts.tolist() == [slow["divergence"][part, n] for n in range(len(found_counts))]


def test_dropped_choices_and_padding():
    """A dropped choice is counted as chosen and as dropped, and reaches no expert; padding is nowhere."""
    part = tokens(
        [[[[0], [1]], [[1], [1]], [[2], [2]]]],
        present=[[True, True, False]],
        kept=[[[[True], [False]], [[True], [True]], [[False], [False]]]],
    )
    found = trace(layer(0, 3, text=part))
    activation = Activation.of_traces([found])
    assert activation.choices("blocks.0.joint").sum(0).tolist() == [1, 3, 0]
    assert activation.sums["dropped/blocks.0.joint"].sum(0).tolist() == [0, 1, 0]
    assert activation.dropped("blocks.0.joint") == 0.25
    assert activation.divergence("word").tolist() == [0, 2, 0]
    assert activation.transitions() == {}


def test_tokens_that_share_a_row_are_counted_once():
    """A convolution with a stride: two tokens of one row; both reach its experts."""
    part = tokens([[[[0], [1]], [[0], [1]]]], counted=[[True, False]])
    activation = Activation.of_traces([trace(layer(0, 3, text=part))])
    assert activation.choices("blocks.0.joint").sum(0).tolist() == [1, 1, 0]
    assert activation.divergence("word").tolist() == [0, 0, 2]


def test_pools_per_modality_and_for_pairs():
    """Below, images and texts have pools of their own; above, pairs have one, which others do not pass."""
    image, text = (
        layer(0, 3, "image", patch=tokens([[[[0]]], [[[1]]]])),
        layer(0, 3, "text", text=tokens([[[[2]]], [[[2]]]])),
    )
    alone, pair = [[True], [False]], [[False], [True]]
    above = layer(1, 3, "image", patch=tokens([[[[0]]], [[[0]]]], present=alone))
    above_text = layer(1, 3, "text", text=tokens([[[[1]]], [[[1]]]], present=alone))
    both = layer(
        1, 3, "pair", patch=tokens([[[[2]]], [[[2]]]], present=pair), text=tokens([[[[0]]], [[[0]]]], present=pair)
    )
    activation = Activation.of_traces([trace(image, text, above, above_text, both, grid=(1, 1), num_pairs=1)])
    assert activation.used == [f"blocks.{n}" for n in ("0.image", "0.text", "1.image", "1.text", "1.pair")]
    assert activation.num_blocks == 2
    found = {places: np.argwhere(table).tolist() for places, table in activation.transitions().items()}
    assert found == {
        ("blocks.0.image", "blocks.1.image"): [[0, 0]],
        ("blocks.0.image", "blocks.1.pair"): [[1, 2]],
        ("blocks.0.text", "blocks.1.text"): [[2, 1]],
        ("blocks.0.text", "blocks.1.pair"): [[2, 0]],
    }
    assert activation.mean_divergence("patch", "word") == 1


def part_of(found: RoutingTrace, images: slice, texts: slice) -> RoutingTrace:
    """Some samples of a trace."""

    def cut(each: LayerTrace) -> LayerTrace:
        chosen = {name: texts if name == "text" else images for name in each.parts}
        parts = {
            name: replace(part, **{field: value[chosen[name]] for field, value in vars(part).items()})
            for name, part in each.parts.items()
        }
        return replace(each, parts=parts)

    layers = tuple(cut(each) for each in found.layers)
    return trace(*layers, grid=found.grid)


def test_batches_and_processes_change_nothing():
    found, known = random_trace(np.random.default_rng(5), images=7, texts=7, blocks=(1, 3))
    options = {"num_experts": 6, "top_k": 2, "num_subtokens": 2, "words": ["bank"]}
    results = []
    for size, ranks in ((7, 1), (1, 1), (3, 1), (2, 2), (1, 3)):
        each = [Activation(["blocks.1.joint", "blocks.3.joint"], **options) for _ in range(ranks)]
        for number, start in enumerate(range(0, 7, size)):
            cut = slice(start, start + size)
            mine = replace(known, **{name: value[cut] for name, value in vars(known).items()})
            each[number % ranks].add(part_of(found, cut, cut), mine)
        total = Activation(["blocks.1.joint", "blocks.3.joint"], **options)
        for activation in reversed(each):
            total.add_bytes(activation.to_bytes())
        results.append(total.to_dict() | {"favourites": total.favourites("word", "blocks.3.joint")})
    assert all(result == results[0] for result in results[1:])
    assert results[0]["specialisation"]["class"] and results[0]["specialisation"]["colour"]


def test_memory_does_not_grow_with_the_data():
    """Once the samples of tokens are full, counts of any number of traces take the same place."""
    activation = Activation(["blocks.1.joint", "blocks.3.joint"], num_experts=6, top_k=2, num_subtokens=2)
    activation.tokens = {"patch": TokenSample(10), "text": TokenSample(10)}
    sizes = []
    for number in range(12):
        found, known = random_trace(np.random.default_rng(number), images=4, texts=4)
        first = 4 * number
        samples = {"image_samples": known.image_samples + first, "text_samples": known.text_samples + first}
        activation.add(found, replace(known, **samples))
        sizes.append(len(activation.to_bytes()))
    assert sizes[3] == sizes[-1] and activation.num_tokens("blocks.1.joint") > 12 * 24


def test_entropies_are_summed_in_whole_units():
    values = np.random.default_rng(0).random((1, 4, 2)).astype(np.float32)
    part = tokens(np.zeros((1, 4, 2, 1)), entropy=values)
    counts = count_trace(trace(layer(0, 1, text=part)))
    assert counts["entropy/blocks.0.joint"].tolist() == [0, 0, sum(round(float(v) * NATS) for v in values.ravel())]
    assert Activation.of_traces([trace(layer(0, 1, text=part))]).entropy("blocks.0.joint") == pytest.approx(
        values.mean()
    )


def test_labels_meet_the_experts_that_their_tokens_chose():
    """Red patches go to expert 0, blue ones to 1, whatever the sub-token; the classes follow the picture."""
    experts = [[[[0], [0]], [[1], [1]]], [[[1], [1]], [[1], [1]]]]
    found = trace(layer(0, 2, patch=tokens(experts)), grid=(1, 2))
    activation = Activation(["blocks.0.joint"], num_experts=2, top_k=1, num_subtokens=2)
    activation.add(found, labels([["red", "blue"], ["blue", "blue"]], classes=["sky", "sea"]))
    colour = activation.specialisation("colour")["blocks.0.joint"]
    assert colour.bits == pytest.approx(colour.label_bits) == pytest.approx(0.25 * 2 + 0.75 * np.log2(4 / 3))
    assert (colour.num_tokens, colour.num_labels) == (4, 2)
    classes = activation.specialisation("class")["blocks.0.joint"]
    assert 0 < classes.bits < classes.label_bits == 1
    assert activation.specialisation("word") == {} and activation.favourites("word", "blocks.0.joint") == []


def test_classes_of_texts_where_there_are_no_pictures():
    activation = Activation(["blocks.0.joint"], num_experts=2, top_k=1, num_subtokens=1)
    activation.add(
        trace(layer(0, 2, text=tokens([[[[0]]], [[[1]]]]))), labels(words=[["a"], ["b"]], classes=["x", "y"])
    )
    assert activation.specialisation("class")["blocks.0.joint"].bits == 1
    assert activation.specialisation("word")["blocks.0.joint"].bits == 1


def test_everything_as_json_values():
    found, _ = random_trace(np.random.default_rng(0))
    activation = Activation.of_traces([found])
    values = json.loads(json.dumps(activation.to_dict(), allow_nan=False))
    assert values["divergence"]["listed"]["mean"] is None
    assert values["activated"].keys() == SHARES.keys()
    for pool in values["pools"].values():
        assert sum(map(sum, pool["choices"].values())) == pool["rows"] * values["top_k"]
        assert pool["rows"] == sum(pool["tokens"].values()) * values["num_subtokens"]
