"""A fair sample of the tokens of a data set, of bounded size, the same however the data were cut into batches."""

from __future__ import annotations

import numpy as np

TOKENS = 20_000
"""Tokens that a sample holds at most."""
LABEL = "<U60"
"""Type of labels: text, longer ones cut."""


class TokenSample:
    """The ``size`` tokens whose hashed place (sample, position) is smallest: a draw that depends on nothing else.

    Attributes:
        columns: equally long arrays by name, at least ``sample`` (int64) and ``position`` (int64).
    """

    def __init__(self, size: int = TOKENS) -> None:
        self.size = size
        self.columns: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.columns.get("sample", ()))

    def add(self, columns: dict[str, np.ndarray]) -> None:
        """Let tokens compete for a place; no two may have the same sample and position."""
        if self.columns:
            columns = {name: np.concatenate([mine, columns[name]]) for name, mine in self.columns.items()}
        order = np.argsort(_hashed(columns["sample"], columns["position"]), kind="stable")[: self.size]
        self.columns = {name: values[order] for name, values in columns.items()}


def _hashed(sample: np.ndarray, position: np.ndarray) -> np.ndarray:
    """A 64-bit number for every place, all different (SplitMix64's finalizer, which is one to one)."""
    value = (sample.astype(np.uint64) << np.uint64(20)) + position.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ (value >> np.uint64(shift))) * np.uint64(factor)
    return value ^ (value >> np.uint64(31))
