"""Mutual information by hand, against a slow formula, and the shuffled baseline against all permutations."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from mhmoe_vl.analysis.specialisation import expert_table, favourites, measure, mutual_information


def slow_mutual_information(pairs: list[tuple[int, int]]) -> float:
    """H(x) + H(y) - H(x, y), from the pairs themselves."""

    def entropy(values: list) -> float:
        return -sum(n / len(values) * math.log2(n / len(values)) for n in Counter(values).values())

    return entropy([x for x, _ in pairs]) + entropy([y for _, y in pairs]) - entropy(pairs)


@pytest.mark.parametrize(
    ("table", "bits"),
    [
        ([[2, 0], [0, 2]], 1.0),  # the expert says the label
        ([[1, 1], [1, 1]], 0.0),
        ([[4, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0], [0, 0, 0, 4]], 2.0),
        ([[2, 2]], 0.0),  # one expert
        ([[0, 0], [0, 0]], 0.0),
        # shares 1/2, 1/4, 1/4; rows 1/2 and 1/2, columns 3/4 and 1/4
        ([[2, 0], [1, 1]], 0.5 * math.log2(4 / 3) + 0.25 * math.log2(2 / 3) + 0.25 * math.log2(2)),
    ],
)
def test_by_hand(table, bits):
    assert mutual_information(np.array(table)) == pytest.approx(bits, abs=1e-12)


def test_against_a_slow_formula():
    rng = np.random.default_rng(0)
    choices, labels = rng.integers(0, 5, (60, 3)), rng.integers(0, 4, 60)
    choices[labels == 1] = choices[labels == 1] % 2
    choices[:4, 2] = -1
    pairs = [(int(e), int(y)) for row, y in zip(choices, labels, strict=True) for e in row if e >= 0]
    table = expert_table(choices, labels, 5, 4)
    assert table.sum() == len(pairs) and table.tolist() == [[Counter(pairs)[e, y] for y in range(4)] for e in range(5)]
    found = measure(choices, np.array(["d", "b", "a", "c"])[labels], 5)
    assert found.bits == pytest.approx(slow_mutual_information(pairs), abs=1e-12)
    shares = Counter(y for _, y in pairs)
    assert found.label_bits == pytest.approx(-sum(n / 176 * math.log2(n / 176) for n in shares.values()))
    assert (found.num_tokens, found.num_labels) == (60, 4)


def test_the_baseline_is_the_mean_over_permutations_of_tokens():
    """Two choices a token move together: shuffling single choices would give a smaller mean."""
    choices, labels = np.array([[0, 0], [0, 1], [1, 1], [2, 2], [2, 2]]), np.array(["a", "a", "b", "b", "c"])
    every = [
        slow_mutual_information([(int(e), y) for row, y in zip(choices, order, strict=True) for e in row])
        for order in itertools.permutations(labels)
    ]
    found = measure(choices, labels, 3, permutations=1500)
    error = np.std(every) / math.sqrt(1500)
    assert abs(found.baseline - np.mean(every)) < 4 * error
    assert found.deviation == pytest.approx(np.std(every), rel=0.15)
    singles = [(int(e), y) for row, y in zip(choices, labels, strict=True) for e in row]
    rng = np.random.default_rng(1)
    orders = [rng.permutation([y for _, y in singles]) for _ in range(500)]
    shuffled = [slow_mutual_information([(e, y) for (e, _), y in zip(singles, order, strict=True)]) for order in orders]
    assert np.mean(shuffled) < found.baseline - 20 * error


def test_groups_change_labels_whole():
    """Three samples of three tokens: 3! permutations, whatever the order in which the tokens lie."""
    sample = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2])
    choices, labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 0])[:, None], np.array(["x", "y", "y"])[sample]
    every = [
        slow_mutual_information([(int(e), order[s]) for e, s in zip(choices[:, 0], sample, strict=True)])
        for order in itertools.permutations(["x", "y", "y"])
    ]
    found = measure(choices, labels, 3, groups=sample, permutations=1000)
    assert abs(found.baseline - np.mean(every)) < 4 * np.std(every) / math.sqrt(1000)
    assert found.bits == pytest.approx(every[0])
    assert found.baseline > measure(choices, labels, 3, permutations=300).baseline  # tokens alone forget the sample


def test_the_same_every_time():
    choices, labels = np.arange(40).reshape(20, 2) % 3, np.arange(20) % 4
    assert measure(choices, labels, 3) == measure(choices, labels, 3)


def test_favourites_by_lift():
    """6 of the 8 choices of expert 0 are dogs, which are 6 of all 20: lift 2.5. Two cats are too few to be listed."""
    choices = np.array([0] * 8 + [1] * 12)[:, None]
    labels = np.array(["dog"] * 6 + ["cat"] * 2 + ["sky"] * 12)
    first, second, third = favourites(choices, labels, 3)
    assert first == [("dog", 6, pytest.approx(2.5))]
    assert second == [("sky", 12, pytest.approx(20 / 12))]
    assert third == []
    dog, cat = ("dog", 6, pytest.approx(2.5)), ("cat", 2, pytest.approx(2.5))
    assert favourites(choices, labels, 3, least=1)[0] == [dog, cat]
    assert favourites(choices, labels, 3, least=1, most=1)[0] == [dog]
