"""The list of answers that a VQA head chooses from, and soft targets over it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.records import TEXT, WHOLE, Check, check, check_lines, fields, items, read_json, read_json_lines
from ..errors import DataError
from ..metrics.vqa_accuracy import answer_accuracy, clean, normalise

OWN_FILE = fields({"answers": items(TEXT), "sha256": TEXT})
LIST: Check = items(TEXT)
LINE = fields({"answer": TEXT, "label": WHOLE})


class AnswerVocabulary:
    """Answers by number.

    Args:
        answers: all different; their order is the order of the head's outputs.

    Attributes:
        sha256: of the list; two lists that differ in anything differ in it.
    """

    def __init__(self, answers: Iterable[str]) -> None:
        self.answers = tuple(answers)
        self.sha256 = hashlib.sha256(json.dumps(self.answers, ensure_ascii=False).encode()).hexdigest()
        self._numbers = {answer: number for number, answer in enumerate(self.answers)}
        self._by_spelling: dict[str, str] = {}
        for answer in self.answers:
            self._by_spelling.setdefault(normalise(answer), answer)

    def __len__(self) -> int:
        return len(self.answers)

    @classmethod
    def build(cls, given: Iterable[str], min_count: int) -> AnswerVocabulary:
        """The normalised answers that occur at least ``min_count`` times, the most frequent first (ties by spelling).

        The rule of the published list of 3,129 (Anderson et al. 2018), which counts ``multiple_choice_answer`` of
        training and validation; that list's order is another.
        """
        counts = Counter(normalise(clean(answer)) for answer in given)
        kept = [answer for answer, count in counts.items() if count >= min_count]
        return cls(sorted(kept, key=lambda answer: (-counts[answer], answer)))

    @classmethod
    def read(cls, path: str | Path) -> AnswerVocabulary:
        """The list in a file: one of ours, a JSON list of texts, or BEiT-3's lines of ``answer`` and ``label``.

        Raises:
            DataError: it is none of these, an answer stands twice, or the hash is not that of the list.
        """
        path = Path(path)
        answers = _answers_of_lines(path) if path.suffix in (".txt", ".jsonl") else _answers_of_json(path)
        twice = [answer for answer, count in Counter(answers).items() if count > 1]
        if twice or not answers:
            what = f"{twice[0]!r} stands twice" if twice else "no answer"
            raise DataError(f"{path}: {what} (name a list of different answers)")
        return cls(answers)

    def to_json(self) -> str:
        """The text of a file that :meth:`read` reads back."""
        return json.dumps({"sha256": self.sha256, "answers": self.answers}, ensure_ascii=False, indent=0) + "\n"

    def number(self, answer: str) -> int | None:
        """The number of an annotator's answer, as it is written or normalised; none when it is not listed."""
        text = clean(answer)
        return self._numbers.get(text, self._numbers.get(normalise(text)))

    def targets(self, answers: Sequence[str]) -> dict[int, float]:
        """What each listed answer would score, by the share of annotators who gave it: of ten, 1 makes 0.3, 2 0.6,
        3 0.9, and 4 or more 1."""
        counts = Counter(self.number(answer) for answer in answers)
        return {number: _share(m, len(answers)) for number, m in counts.items() if number is not None}

    def ceiling(self, answers: Sequence[str]) -> float:
        """The best official accuracy, 0 to 1, that any listed answer has on a question."""
        spelled = {clean(answer) for answer in answers} & self._numbers.keys()
        folded = {self._by_spelling.get(normalise(clean(answer))) for answer in answers} - {None}
        return max((answer_accuracy(answer, answers) for answer in spelled | folded), default=0.0)


def _share(matches: int, annotators: int) -> float:
    kept, left_out = min(matches, 3), min(matches - 1, 3)
    return ((annotators - matches) * kept + matches * left_out) / (3 * annotators)


def _answers_of_json(path: Path) -> list[str]:
    value: Any = read_json(path)
    if isinstance(value, list):
        check(path, value, LIST)
        return value
    check(path, value, OWN_FILE)
    if AnswerVocabulary(value["answers"]).sha256 != value["sha256"]:
        raise DataError(f"{path}: sha256 is not that of the answers (get the file again)")
    return value["answers"]


def _answers_of_lines(path: Path) -> list[str]:
    lines: list[Mapping[str, Any]] = read_json_lines(path)
    check_lines(path, lines, LINE, unique="label")
    if sorted(line["label"] for line in lines) != list(range(len(lines))):
        raise DataError(f"{path}: labels are not 0 to {len(lines) - 1} (get the file again)")
    return [line["answer"] for line in sorted(lines, key=lambda line: line["label"])]
