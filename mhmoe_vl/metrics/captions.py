"""BLEU, ROUGE-L and CIDEr of captions, on token strings, in the numbers of coco-caption.

Every function takes, image by image, the references (a list of token strings) and one candidate (a token string).
Tokens stand apart by single spaces, as :func:`~mhmoe_vl.metrics.ptb_tokenizer.tokenize` writes them. All scores are
fractions but CIDEr, which is 10 for a caption equal to all its references.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import DataError, one_line

MAX_N = 4
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0
CIDER_SCALE = 10.0
TINY, SMALL = 1e-15, 1e-9
"""A precision of BLEU is ``(matches + TINY) / (k-grams + SMALL)``, so that one of 0 leaves the product above 0."""

References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class CaptionScores:
    """What :func:`score_captions` found.

    Attributes:
        corpus: ``Bleu_1`` to ``Bleu_4``, ``ROUGE_L``, ``CIDEr`` of the whole set.
        per_image: the same names, each with the score of every image by its id.
    """

    corpus: dict[str, float]
    per_image: dict[str, dict[Hashable, float]]


def score_captions(references: Mapping[Hashable, Sequence[str]], candidates: Mapping[Hashable, str]) -> CaptionScores:
    """All scores of a whole split: CIDEr's word weights come from the references given.

    Args:
        references: the token strings of every image by its id, at least one each.
        candidates: one token string for every image.

    Raises:
        DataError: no image at all, an image without reference or candidate, or a candidate without image.
    """
    if not references:
        raise DataError("captions: no image to score (give references)")
    lonely = sorted(map(str, references.keys() ^ candidates.keys()))
    if lonely:
        what = f"{len(lonely)} images with references or a caption only, first {one_line(lonely[0], 60)}"
        raise DataError(f"captions: {what} (give one caption for each image)")
    ids = list(references)
    bare = [image for image in ids if not references[image]]
    if bare:
        what = f"{len(bare)} images without reference, first {one_line(bare[0], 60)}"
        raise DataError(f"captions: {what} (give at least one for each image)")
    pairs = [references[i] for i in ids], [candidates[i] for i in ids]
    found = {f"Bleu_{n}": scores for n, scores in enumerate(bleu(*pairs), start=1)}
    found |= {"ROUGE_L": rouge_l(*pairs), "CIDEr": cider(*pairs)}
    return CaptionScores(
        {name: corpus for name, (corpus, _) in found.items()},
        {name: dict(zip(ids, single, strict=True)) for name, (_, single) in found.items()},
    )


def bleu(references: References, candidates: Sequence[str]) -> list[tuple[float, list[float]]]:
    """BLEU-1 to BLEU-4 (Papineni et al. 2002): ``min(1, exp(1 - r / c)) * (p_1 ... p_n) ** (1 / n)``.

    ``p_k`` is the share of k-grams that are in a reference, counted at most as often as in the reference that has it
    most often; ``c`` the candidate's length; ``r`` that of the reference nearest to it, the shorter of two as near.
    The corpus score sums matches, k-grams and lengths over all images before it divides.

    Returns:
        for each order 1 to 4, the corpus score and one score per image.
    """
    total = [0] * (2 * MAX_N + 2)
    single = []
    for captions, candidate in zip(references, candidates, strict=True):
        counts = _bleu_counts([caption.split() for caption in captions], candidate.split())
        total = [a + b for a, b in zip(total, counts, strict=True)]
        single.append(_bleu_scores(counts))
    return list(zip(_bleu_scores(total), map(list, zip(*single, strict=True)), strict=True))


def _bleu_counts(references: list[list[str]], candidate: list[str]) -> list[int]:
    """Matches of order 1 to 4, k-grams of order 1 to 4, the candidate's length, the nearest reference's length."""
    most: Counter[tuple[str, ...]] = Counter()
    for reference in references:
        most |= _ngrams(reference)
    matches = [0] * MAX_N
    for ngram, count in _ngrams(candidate).items():
        matches[len(ngram) - 1] += min(count, most[ngram])
    length = len(candidate)
    nearest = min((abs(len(reference) - length), len(reference)) for reference in references)[1]
    return [*matches, *(max(0, length - k) for k in range(MAX_N)), length, nearest]


def _bleu_scores(counts: list[int]) -> list[float]:
    matches, ngrams, (length, nearest) = counts[:MAX_N], counts[MAX_N : 2 * MAX_N], counts[2 * MAX_N :]
    ratio = (length + TINY) / (nearest + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for n in range(MAX_N):
        product *= (matches[n] + TINY) / (ngrams[n] + SMALL)
        scores.append(brevity * product ** (1 / (n + 1)))
    return scores


def rouge_l(references: References, candidates: Sequence[str]) -> tuple[float, list[float]]:
    """ROUGE-L (Lin 2004): ``(1 + b^2) P R / (R + b^2 P)`` with b = 1.2, from longest common subsequences.

    The best precision and the best recall over the references, which need not come from the same one.

    Returns:
        the mean over images and one score per image.
    """
    single = [_rouge(*pair) for pair in zip(references, candidates, strict=True)]
    return _mean(single), single


def _rouge(references: Sequence[str], candidate: str) -> float:
    # An empty text is one empty token here, unlike in the other metrics.
    tokens, others = candidate.split(" "), [reference.split(" ") for reference in references]
    common = [_common_length(tokens, other) for other in others]
    precision = max(common) / len(tokens)
    recall = max(length / len(other) for length, other in zip(common, others, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    weight = ROUGE_BETA**2
    return (1 + weight) * precision * recall / (recall + weight * precision)


def _common_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence: a row of the usual table is the bits of one number (Hyyrö 2004)."""
    places: Counter[str] = Counter()
    for position, token in enumerate(a):
        places[token] |= 1 << position
    row = full = (1 << len(a)) - 1
    for token in b:
        matches = row & places[token]
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()


def cider(references: References, candidates: Sequence[str]) -> tuple[float, list[float]]:
    """CIDEr as coco-caption names it, which is CIDEr-D (Vedantam et al. 2015, section 7).

    For each order 1 to 4 the cosine between the tf-idf vectors of candidate and reference, the candidate's entries
    cut at the reference's, times ``exp(-d^2 / (2 * 6^2))``; the mean over orders and references, times 10. Raw counts
    are the term frequencies, ``log(images / max(1, images with the n-gram in a reference))`` the weights, and ``d``
    the difference of the numbers of 2-grams. One image alone scores 0: all weights are.

    Returns:
        the mean over images and one score per image.
    """
    counts = [[_ngrams(caption.split()) for caption in captions] for captions in references]
    images_with: Counter[tuple[str, ...]] = Counter()
    for captions in counts:
        images_with.update(set().union(*captions))
    log_images = math.log(len(counts)) if counts else 0.0
    weights = {ngram: (log_images - math.log(images)) ** 2 for ngram, images in images_with.items()}
    single = []
    for captions, candidate in zip(counts, candidates, strict=True):
        vector = _Vector.of(_ngrams(candidate.split()), weights, log_images**2)
        others = [_Vector.of(caption, weights, log_images**2) for caption in captions]
        single.append(CIDER_SCALE * _mean([_similarity(vector, other, weights) for other in others]))
    return _mean(single), single


@dataclass(frozen=True)
class _Vector:
    """n-gram counts with the length of their tf-idf vector for each order, and the number of 2-grams."""

    counts: Counter[tuple[str, ...]]
    norms: list[float]
    length: int

    @classmethod
    def of(cls, counts: Counter[tuple[str, ...]], weights: dict[tuple[str, ...], float], unseen: float) -> _Vector:
        """``weights`` are squared; ``unseen`` is that of n-grams in no reference."""
        squares = [0.0] * MAX_N
        length = 0
        for ngram, count in counts.items():
            squares[len(ngram) - 1] += count * count * weights.get(ngram, unseen)
            length += count if len(ngram) == 2 else 0
        return cls(counts, [math.sqrt(square) for square in squares], length)


def _similarity(candidate: _Vector, reference: _Vector, weights: dict[tuple[str, ...], float]) -> float:
    products = [0.0] * MAX_N
    for ngram, count in candidate.counts.items():
        if other := reference.counts.get(ngram):
            products[len(ngram) - 1] += min(count, other) * other * weights[ngram]
    norms = [a * b for a, b in zip(candidate.norms, reference.norms, strict=True)]
    cosines = [product / norm for product, norm in zip(products, norms, strict=True) if norm]
    penalty = math.exp(-((candidate.length - reference.length) ** 2) / (2 * CIDER_SIGMA**2))
    return penalty * sum(cosines) / MAX_N


def _ngrams(tokens: list[str]) -> Counter[tuple[str, ...]]:
    """How often each n-gram of order 1 to 4 occurs."""
    return Counter(tuple(tokens[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(tokens) - n + 1))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
