"""NLVR2: accuracy, and consistency over the image pairs of one sentence (Suhr et al. 2019, section 5).

An example is known by its identifier ``<split>-<set>-<pair>-<sentence>``; those that differ in ``pair`` only hold one
sentence against several image pairs. NLVR (v1) has ``<sentence>-<picture>``. Predictions are handed in as lines
``identifier,prediction`` with ``True`` or ``False``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from .coverage import require_coverage

_IDENTIFIER = re.compile(r"(\w+-\d+)-\d+(-\d+)|(\d+)-\d+")


def sentence_key(identifier: str) -> str | None:
    """What the identifiers of one sentence have in common; none when it is no identifier.

    ``dev-850-0-1`` -> ``dev-850-1``; of NLVR (v1), ``1572-0`` -> ``1572``.
    """
    match = _IDENTIFIER.fullmatch(identifier)
    return match and "".join(filter(None, match.groups()))


def score_nlvr2(predictions: Mapping[str, bool], labels: Mapping[str, bool]) -> dict[str, float]:
    """Score one prediction for every example of a split.

    Args:
        predictions: by identifier.
        labels: by identifier.

    Returns:
        ``accuracy``, the fraction of examples predicted right, and ``consistency``, the fraction of sentences that are
        right for all of their image pairs.

    Raises:
        DataError: the identifiers of the two are not the same, or there are none.
    """
    require_coverage(predictions, labels, "example")
    by_sentence: dict[str | None, list[bool]] = defaultdict(list)
    for identifier, label in labels.items():
        by_sentence[sentence_key(identifier)].append(predictions[identifier] == label)
    right = sum(map(sum, by_sentence.values()))
    return {"accuracy": right / len(labels), "consistency": sum(map(all, by_sentence.values())) / len(by_sentence)}


def to_csv(predictions: Mapping[str, bool]) -> str:
    """The text of a submission: a line ``identifier,prediction`` per example, without a head line."""
    return "".join(f"{identifier},{prediction}\n" for identifier, prediction in predictions.items())
