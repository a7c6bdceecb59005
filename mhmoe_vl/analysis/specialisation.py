"""Do experts specialise? Mutual information of expert and label, beside what shuffled labels give."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

PERMUTATIONS = 100


@dataclass(frozen=True)
class Specialisation:
    """Mutual information of the chosen expert and a label, over all choices of the tokens.

    Attributes:
        bits: I(expert; label), in bits.
        baseline: its mean after shuffling the labels; above zero because tokens are few.
        deviation: standard deviation of that over the shuffles.
        label_bits: entropy of the label over the choices, which is the most that ``bits`` can be.
        num_tokens, num_labels: tokens and different labels looked at.
    """

    bits: float
    baseline: float
    deviation: float
    label_bits: float
    num_tokens: int
    num_labels: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def mutual_information(table: np.ndarray) -> float:
    """I(row; column) in bits of a table of counts: sum over cells of p log2(p / (p_row p_column)); 0 when empty."""
    total = table.sum()
    cells = table[table > 0] / total if total else np.zeros(0)
    expected = np.outer(table.sum(1), table.sum(0))[table > 0] / total**2 if total else cells
    return float((cells * np.log2(cells / expected)).sum())


def expert_table(choices: np.ndarray, codes: np.ndarray, num_experts: int, num_labels: int) -> np.ndarray:
    """(E, C) int64: how often tokens with label c chose expert e.

    Args:
        choices: (n, J) experts that a token chose; negative ones are not counted.
        codes: (n,) label of each token, from 0.
        num_experts, num_labels: E and C.
    """
    flat = (codes[:, None] + choices.astype(np.int64) * num_labels)[choices >= 0]
    return np.bincount(flat, minlength=num_experts * num_labels).reshape(num_experts, num_labels)


def measure(
    choices: np.ndarray,
    labels: np.ndarray,
    num_experts: int,
    *,
    groups: np.ndarray | None = None,
    permutations: int = PERMUTATIONS,
) -> Specialisation:
    """How much the expert says about the label.

    The baseline shuffles labels between tokens, all choices of a token together, so that it keeps how often each expert
    and each label occurs. With ``groups`` whole groups change labels: tokens of one picture go to similar experts
    whatever its class, and chance must be allowed that too. The shuffles are always the same ones.

    Args:
        choices: (n, J) as for :func:`expert_table`.
        labels: (n,) values that can be sorted.
        num_experts: E.
        groups: (n,) number of the group, whose tokens all have one label.
        permutations: shuffles.
    """
    names, codes = np.unique(labels, return_inverse=True)
    size = num_experts, len(names)
    table = expert_table(choices, codes, *size)
    _, first, member = np.unique(np.arange(len(codes)) if groups is None else groups, True, True)
    rng = np.random.default_rng(0)
    shuffled = (codes[first][rng.permutation(len(first))][member] for _ in range(permutations))
    chance = [mutual_information(expert_table(choices, codes, *size)) for codes in shuffled]
    shares = table.sum(0) / max(table.sum(), 1)
    return Specialisation(
        bits=mutual_information(table),
        baseline=float(np.mean(chance)),
        deviation=float(np.std(chance)),
        label_bits=float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum()),
        num_tokens=len(codes),
        num_labels=len(names),
    )


def favourites(
    choices: np.ndarray, labels: np.ndarray, num_experts: int, *, most: int = 6, least: int = 5
) -> list[list[tuple[str, int, float]]]:
    """For every expert the labels that it takes above their share: (label, choices, lift), the largest lift first.

    The lift is the share of the expert's choices that have the label over the label's share of all choices.

    Args:
        choices, labels, num_experts: as for :func:`measure`.
        most: labels per expert.
        least: choices that a label needs at an expert to be listed.
    """
    names, codes = np.unique(labels, return_inverse=True)
    table = expert_table(choices, codes, num_experts, len(names))
    expected = np.outer(table.sum(1), table.sum(0)) / max(table.sum(), 1)
    found = []
    for row, chance in zip(table, expected, strict=True):
        listed = np.flatnonzero((row >= least) & (row > chance))
        order = sorted(listed, key=lambda label: (-row[label] / chance[label], -row[label], label))
        found.append([(str(names[i]), int(row[i]), float(row[i] / chance[i])) for i in order[:most]])
    return found
