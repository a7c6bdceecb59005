"""VQA v2's files as they are downloaded: questions, annotations with ten answers each, pictures by COCO's names."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from .annotated import Example, PictureFolders
from .records import TEXT, WHOLE, BadRecords, Check, check, fields, items, leaf, read_json

ANNOTATION: Mapping[str, Check] = {
    "question_id": WHOLE,
    "question_type": TEXT,
    "answer_type": TEXT,
    "answers": items(fields({"answer": TEXT})),
}
SOME_TEXT = leaf("a text that is not empty", lambda value: isinstance(value, str) and bool(value.strip()))
QUESTIONS = fields(
    {
        "questions": items(
            fields({"question_id": WHOLE, "image_id": WHOLE, "question": SOME_TEXT}), unique="question_id"
        )
    },
    {"data_subtype": TEXT},
)


class Question(NamedTuple):
    """A question and, where its split has them, the annotators' answers (none in test splits)."""

    question_id: int
    image_id: int
    question: str
    question_type: str
    answer_type: str
    most_given: str
    answers: tuple[str, ...] | None


def read_annotations(path: Path, more: Mapping[str, Check] | None = None) -> list[dict[str, Any]]:
    """The annotations of an official file.

    Args:
        path: the file.
        more: fields that every annotation must have beside those that scoring needs.

    Raises:
        DataError: it is not one, a question stands twice or has no answer, or there are no questions.
    """
    value = read_json(path)
    check(path, value, fields({"annotations": items(fields({**ANNOTATION, **(more or {})}), unique="question_id")}))
    annotations = value["annotations"]
    if not annotations:
        raise DataError(f"{path}: annotations: none (give the annotations of a split)")
    bare = [number for number, annotation in enumerate(annotations) if not annotation["answers"]]
    if bare:
        raise BadRecords(path, [(f"annotations[{number}].answers", "need at least 1, got none") for number in bare])
    return annotations


def read_questions(questions: Path, annotations: Path | None, folders: PictureFolders) -> list[Example]:
    """The questions of a split, each with its picture; ``record`` is a :class:`Question`.

    Pictures are ``COCO_<data_subtype>_<image id, 12 digits>.jpg``, or the digits alone.

    Raises:
        DataError: a file is not an official one, or the two are not about the same questions and pictures.
    """
    value = read_json(questions)
    check(questions, value, QUESTIONS)
    if not value["questions"]:
        raise DataError(f"{questions}: questions: none (give the questions of a split)")
    answered = None if annotations is None else _by_question(annotations)
    if answered is not None:
        _require_same(questions, value["questions"], annotations, answered)
    prefix = f"COCO_{value.get('data_subtype', '')}_"
    found = []
    for entry in value["questions"]:
        name = f"{entry['image_id']:012d}.jpg"
        record = _question(entry, answered and answered[entry["question_id"]])
        found.append(Example(str(record.question_id), record, (folders.find(prefix + name, name),), str(questions)))
    return found


def _by_question(path: Path) -> dict[int, dict[str, Any]]:
    annotations = read_annotations(path, {"image_id": WHOLE, "multiple_choice_answer": TEXT})
    return {annotation["question_id"]: annotation for annotation in annotations}


def _require_same(
    questions: Path, entries: list[dict[str, Any]], annotations: Path, answered: Mapping[int, dict[str, Any]]
) -> None:
    asked = {entry["question_id"]: entry["image_id"] for entry in entries}
    if asked.keys() != answered.keys():
        unanswered, unasked = len(asked.keys() - answered.keys()), len(answered.keys() - asked.keys())
        what = f"{unanswered} questions of {questions} without annotation, {unasked} annotations without question"
        raise DataError(f"{annotations}: {what} (give the files of one split)")
    other = [number for number, image in asked.items() if answered[number]["image_id"] != image]
    if other:
        what = f"{len(other)} questions about another image_id than in {questions}, first {other[0]}"
        raise DataError(f"{annotations}: {what} (give the files of one split)")


def _question(entry: dict[str, Any], annotation: dict[str, Any] | None) -> Question:
    if annotation is None:
        return Question(entry["question_id"], entry["image_id"], entry["question"], "", "", "", None)
    return Question(
        entry["question_id"],
        entry["image_id"],
        entry["question"],
        sys.intern(annotation["question_type"]),
        sys.intern(annotation["answer_type"]),
        sys.intern(annotation["multiple_choice_answer"]),
        tuple(sys.intern(answer["answer"]) for answer in annotation["answers"]),
    )
