"""VQA accuracy, to the digit of the official evaluation (visualqa.org, version 2 of the data).

An answer counts by how many of the ten annotators gave it: of the ten sets that leave one of them out, the mean of
``min(matches / 3, 1)`` (Antol et al. 2015, section 3). Answers are compared after :func:`normalise`, but **only when
the annotators disagree**: where all gave the same text, the prediction has to be that very text.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .coverage import require_coverage

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Marks that vanish or become a space; apostrophes and colons stay, full stops have a rule of their own."""

ARTICLES = frozenset({"a", "an", "the"})

NUMBER_WORDS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"},
    **{"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}

_CONTRACTED = """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't oughtn't
    shan't shouldn't wasn't weren't won't wouldn't
    could've might've must've not've should've they've we've what've where've who've would've you've
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
    there'd've they'd've we'd've who'd've wouldn't've you'd've y'all'd've
    he'd how'd it'd someone'd something'd there'd they'd where'd who'd you'd
    how'll it'll somebody'll someone'll something'll they'll what'll who'll why'll you'll y'all'll
    there're they're what're why're you're
    he's how's somebody's someone's that's there's what's when's where's who's why's
    ma'am o'clock y'all 'twas 'ow's'at
"""

CONTRACTIONS = {
    word[: mark.start()] + word[mark.end() :]: word for word in _CONTRACTED.split() for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}
"""Each contraction of the published list by its spellings with one apostrophe forgotten, and the list's odd one out."""

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32


@dataclass(frozen=True)
class VQAScores:
    """What :func:`score_vqa` found; all in percent.

    Attributes:
        overall: mean over all questions.
        per_answer_type: mean by ``answer_type`` (yes/no, number, other).
        per_question_type: mean by ``question_type`` (the first words of the question).
        per_question: accuracy of every question by its id.
    """

    overall: float
    per_answer_type: dict[str, float]
    per_question_type: dict[str, float]
    per_question: dict[int, float]


def score_vqa(answers: Mapping[int, str], annotations: Sequence[Mapping[str, Any]]) -> VQAScores:
    """Score one answer for every question of a split.

    Args:
        answers: the predicted answer by question id.
        annotations: as in the official file: ``question_id``, ``question_type``, ``answer_type`` and ``answers``, a
            list of ``{"answer": text}`` with one entry per annotator, at least one.

    Raises:
        DataError: the ids of the two are not the same, or there are none.
    """
    require_coverage(answers, (annotation["question_id"] for annotation in annotations), "question")
    per_question = {}
    by_answer_type, by_question_type = defaultdict(list), defaultdict(list)
    for annotation in annotations:
        given = [answer["answer"] for answer in annotation["answers"]]
        accuracy = 100 * answer_accuracy(answers[annotation["question_id"]], given)
        per_question[annotation["question_id"]] = accuracy
        by_answer_type[annotation["answer_type"]].append(accuracy)
        by_question_type[annotation["question_type"]].append(accuracy)
    return VQAScores(_mean(per_question.values()), _means(by_answer_type), _means(by_question_type), per_question)


def answer_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy of one prediction, 0 to 1, against the answers of the annotators (ten, in the published data)."""
    prediction, answers = clean(prediction), [clean(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalise(prediction), [normalise(answer) for answer in answers]
    count, matches = len(answers), answers.count(prediction)
    left_in, left_out = min(matches, 3), min(matches - 1, 3)
    return ((count - matches) * left_in + matches * left_out) / (3 * count)


def clean(answer: str) -> str:
    """What is done to every answer: line breaks and tabs become spaces, and the ends are trimmed."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=2**16)
def normalise(answer: str) -> str:
    """The official spelling of an answer: punctuation first, then lower case, numbers, articles and contractions."""
    words = [NUMBER_WORDS.get(word, word) for word in _without_punctuation(answer).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(answer: str) -> str:
    """A mark beside a space vanishes, as do all marks of an answer with a comma between digits; others become spaces.

    Full stops vanish except before a digit. The official code passes a flag of ``re`` where ``sub`` takes the most
    replacements to make, so only the first 32 of them do.
    """
    has_number = _COMMA_IN_NUMBER.search(answer) is not None
    text = answer
    for mark in PUNCTUATION:
        vanishes = has_number or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if vanishes else " ")
    return _FULL_STOP.sub("", text, count=_MOST_FULL_STOPS)


def _means(groups: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: _mean(groups[name]) for name in sorted(groups)}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
