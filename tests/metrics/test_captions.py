"""BLEU, ROUGE-L and CIDEr: cases worked by hand, and the numbers of coco-caption's own code on its own tokens."""

from __future__ import annotations

import json
import math
from itertools import compress, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_vl.errors import DataError
from mhmoe_vl.metrics.captions import bleu, cider, rouge_l, score_captions


def first(scores: list[tuple[float, list[float]]]) -> list[float]:
    """The BLEU scores of the first image."""
    return [single[0] for _, single in scores]


def test_bleu_of_a_short_candidate_is_its_brevity() -> None:
    brevity = math.exp(1 - 4 / 3)
    found = first(bleu([["the cat sat down"]], ["the cat sat"]))
    assert found[:3] == pytest.approx([brevity] * 3, abs=1e-8)
    assert found[3] == pytest.approx(brevity * (1e-15 / 1e-9) ** 0.25, rel=1e-6)  # it has no 4-gram


def test_bleu_counts_a_word_as_often_as_the_best_reference_does() -> None:
    assert first(bleu([["the cat", "the the dog"]], ["the the the the"]))[0] == pytest.approx(2 / 4)


@pytest.mark.parametrize(
    ("references", "brevity"),
    [(["a b c", "a b c d e"], 1.0), (["a b c d e", "a b c"], 1.0), (["a b c d e", "a"], math.exp(1 - 5 / 4))],
)
def test_bleu_takes_the_nearest_length_and_of_two_the_shorter(references: list[str], brevity: float) -> None:
    assert first(bleu([references], ["a b c d"]))[0] == pytest.approx(brevity)


def test_bleu_of_a_set_sums_before_it_divides() -> None:
    corpus, single = bleu([["a b c d"], ["x"]], ["a b c d", "y"])[0]
    assert single == pytest.approx([1, 0], abs=1e-9)
    assert corpus == pytest.approx(4 / 5)


def test_rouge_takes_the_best_precision_and_the_best_recall() -> None:
    mean, single = rouge_l([["a c e"], ["a c e", "d"], ["x"]], ["a b c d"] * 3)
    one = 2.44 * (1 / 2) * (2 / 3) / (2 / 3 + 1.44 / 2)
    two = 2.44 * (1 / 2) * 1 / (1 + 1.44 / 2)  # half of the candidate is in the first reference, all of "d" in it
    assert single == pytest.approx([one, two, 0])
    assert mean == pytest.approx((one + two) / 3)


def test_rouge_needs_the_order_but_no_neighbours() -> None:
    assert rouge_l([["a b c d e"]], ["c a e b"])[0] == pytest.approx(2.44 * (1 / 2) * (2 / 5) / (2 / 5 + 1.44 / 2))


@given(*[st.lists(st.sampled_from("abcd"), min_size=1, max_size=9)] * 2)
def test_rouge_finds_the_longest_common_subsequence(a: list[str], b: list[str]) -> None:
    def subsequences(tokens: list[str]) -> set[tuple[str, ...]]:
        return {tuple(compress(tokens, mask)) for mask in product((0, 1), repeat=len(tokens))}

    longest = max(map(len, subsequences(a) & subsequences(b)))
    precision, recall = longest / len(a), longest / len(b)
    expected = 2.44 * precision * recall / (recall + 1.44 * precision) if longest else 0
    assert rouge_l([[" ".join(b)]], [" ".join(a)])[0] == pytest.approx(expected)


def test_cider_of_equal_captions_is_ten() -> None:
    texts = ["a b c d", "e f g h i"]
    assert cider([[text] for text in texts], texts) == (pytest.approx(10), pytest.approx([10, 10]))


def test_cider_by_hand() -> None:
    # Both words of the first reference weigh log 2, and so do its pair and a pair that no reference has.
    cosines = (1 + 1) / math.sqrt(5 * 2) + 1 / math.sqrt(2 * 1)
    expected = 10 * cosines / 4 * math.exp(-(1**2) / 72)
    assert cider([["a b"], ["c d"]], ["a a b", "c d"])[1] == pytest.approx([expected, 5])


def test_cider_weighs_words_by_the_images_that_have_them_not_by_references() -> None:
    single = cider([["a b", "a b"], ["a c"], ["d"]], ["a", "c", "d"])[1]
    common, rare = math.log(3 / 2), math.log(3)
    assert single[0] == pytest.approx(10 / 4 * common / math.hypot(common, rare) * math.exp(-1 / 72))
    assert single[1] == pytest.approx(10 / 4 * rare / math.hypot(common, rare) * math.exp(-1 / 72))


def test_cider_of_one_image_is_zero() -> None:
    assert cider([["a b c d"]], ["a b c d"]) == (0, [0])


def test_an_empty_candidate_scores_nothing() -> None:
    scores = score_captions({1: ["a b"], 2: ["c"]}, {1: "", 2: ""})
    assert list(scores.corpus.values()) == pytest.approx([0] * 6, abs=1e-5)


def test_scores_do_not_depend_on_the_order_of_images() -> None:
    references = {1: ["a b c", "b"], 2: ["c d e"], 3: ["a c"]}
    candidates = {3: "a", 1: "a b", 2: "d e"}
    turned = dict(reversed(references.items()))
    assert score_captions(references, candidates).corpus == pytest.approx(score_captions(turned, candidates).corpus)


@pytest.mark.parametrize(
    ("references", "candidates", "what"),
    [
        ({}, {}, "no image"),
        ({1: ["a"], 2: ["b"]}, {1: "a"}, "1 images with references or a caption only, first 2"),
        ({1: ["a"]}, {1: "a", 0: "b"}, "1 images with references or a caption only, first 0"),
        ({0: [], 1: ["a"]}, {0: "a", 1: "a"}, "1 images without reference, first 0"),
    ],
)
def test_a_set_that_is_not_whole_is_refused(references: dict, candidates: dict, what: str) -> None:
    with pytest.raises(DataError, match=what):
        score_captions(references, candidates)


def test_tokens_of_coco_caption_give_its_numbers(data_dir: Path) -> None:
    known = data_dir / "coco_captions_val2017" / "known_scores"
    tokens, expected, per_image = (
        json.loads((known / f"{name}.json").read_text()) for name in ("tokenized", "expected", "per_image")
    )
    scores = score_captions(tokens["references"], {image: text for image, [text] in tokens["candidates"].items()})
    for name, value in scores.corpus.items():
        assert value == pytest.approx(expected[name], abs=1e-9), name
    for name in ("ROUGE_L", "CIDEr", "Bleu_4"):
        single = [scores.per_image[name][str(image)] for image in per_image["image_id"]]
        assert single == pytest.approx(per_image[name], abs=1e-9), name
