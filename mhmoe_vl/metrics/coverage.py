"""Whether predictions cover a split: no example left out, none twice, none from elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from ..errors import DataError, one_line

NAMED = 3
"""How many ids a line names; the others are counted."""


def coverage_problems(predicted: Iterable[Hashable], wanted: Iterable[Hashable], noun: str) -> list[str]:
    """One line with a count for each way in which predictions do not cover a split; empty when they do.

    Args:
        predicted: the id of every prediction, in order.
        wanted: the ids of the split.
        noun: what an id stands for, in the singular: ``"question"``.
    """
    split, counts = dict.fromkeys(wanted), Counter(list(predicted))
    missing = [identity for identity in split if identity not in counts]
    extra = [identity for identity in counts if identity not in split]
    double = [identity for identity, count in counts.items() if count > 1]
    found = []
    if missing:
        found.append(f"{len(missing)} of {len(split)} {noun}s missing: {_named(missing)} (predict the whole split)")
    if extra:
        found.append(f"{len(extra)} {noun}s not in the split: {_named(extra)} (leave them out)")
    if double:
        found.append(f"{len(double)} {noun}s given twice or more: {_named(double)} (keep one prediction each)")
    return found


def require_coverage(predicted: Iterable[Hashable], wanted: Iterable[Hashable], noun: str) -> None:
    """Refuse to score anything but the whole split.

    Raises:
        DataError: an id is missing, unknown or doubled; or the split is empty.
    """
    wanted = list(wanted)
    if not wanted:
        raise DataError(f"no {noun} to score (give the annotations of a split)")
    if found := coverage_problems(predicted, wanted, noun):
        raise DataError("; ".join(found))


def _named(identities: Sequence[Hashable]) -> str:
    return ", ".join([one_line(name, 40) for name in identities[:NAMED]] + ["..."] * (len(identities) > NAMED))
