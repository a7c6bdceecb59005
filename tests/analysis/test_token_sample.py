"""A sample that does not depend on the order in which tokens come."""

from __future__ import annotations

import numpy as np

from mhmoe_vl.analysis.token_sample import TokenSample, _hashed


def columns(sample, position):
    sample, position = np.asarray(sample, np.int64), np.asarray(position, np.int64)
    return {
        "sample": sample,
        "position": position,
        "label": np.array([f"{s}-{p}" for s, p in zip(sample, position, strict=True)]),
    }


def same(a, b):
    return a.columns.keys() == b.columns.keys() and all(np.array_equal(a.columns[k], b.columns[k]) for k in a.columns)


def test_any_batches_in_any_order_give_the_same_sample():
    sample, position = (x.ravel() for x in np.indices((50, 20)))
    whole = TokenSample(100)
    whole.add(columns(sample, position))
    assert len(whole) == 100
    for seed, size in ((0, 1), (1, 7), (2, 333)):
        order = np.random.default_rng(seed).permutation(1000)
        parts = TokenSample(100)
        for start in range(0, 1000, size):
            chosen = order[start : start + size]
            parts.add(columns(sample[chosen], position[chosen]))
        assert same(whole, parts)
    assert all(f"{s}-{p}" == name for s, p, name in zip(*whole.columns.values(), strict=True))


def test_fewer_tokens_are_all_kept():
    few = TokenSample(100)
    assert len(few) == 0
    few.add(columns([3, 1, 2], [0, 5, 9]))
    assert sorted(few.columns["sample"].tolist()) == [1, 2, 3]


def test_places_hash_apart_and_evenly():
    sample, position = (x.ravel() for x in np.indices((300, 300)))
    hashed = _hashed(sample, position)
    assert len(np.unique(hashed)) == 90_000
    counts = np.histogram((hashed >> np.uint64(32)).astype(np.float64), bins=16, range=(0, 2**32))[0]
    expected = 90_000 / 16
    assert ((counts - expected) ** 2 / expected).sum() < 40  # chi-square of 15 degrees of freedom: 0.05 % above
    big = TokenSample(20_000)
    big.add(columns(sample, position))
    drawn = np.bincount(big.columns["sample"], minlength=300)
    assert drawn.min() > 30 and drawn.max() < 110  # 67 on average
