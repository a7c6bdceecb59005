"""VQA v2's files as they are downloaded: questions, annotations with ten answers each, pictures by COCO's names."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from .annotated import SOME_TEXT, Example, PictureFolders, Pictures
from .records import TEXT, WHOLE, Check, check, fields, items, leaf, read_json, sound

ANNOTATION: Mapping[str, Check] = {
    "question_id": WHOLE,
    "question_type": TEXT,
    "answer_type": TEXT,
    "answers": items(fields({"answer": TEXT}), least=1),
}
"""What scoring needs."""
LEARNT = {"image_id": WHOLE, "multiple_choice_answer": TEXT}
"""What training needs too."""
ASKED = {"image_id": WHOLE, "question": SOME_TEXT}
SUBTYPE = leaf(
    "a name such as train2014", lambda value: isinstance(value, str) and bool(re.fullmatch(r"[\w-]+", value, re.ASCII))
)


def annotations_file(more: Mapping[str, Check] = LEARNT) -> Check:
    """Annotations, each with the fields that scoring needs and ``more``."""
    entries = items(fields({**ANNOTATION, **more}), unique="question_id", least=1)
    return fields({"annotations": entries})


def questions_file(more: Mapping[str, Check] = ASKED) -> Check:
    """Questions, each with its id and ``more``."""
    entries = items(fields({"question_id": WHOLE, **more}), unique="question_id", least=1)
    return fields({"questions": entries}, {"data_subtype": SUBTYPE})


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
    check(path, value, annotations_file(more or {}))
    return value["annotations"]


def read_question_ids(path: Path) -> list[int]:
    """The ids in an official file of questions.

    Raises:
        DataError: it is not one, a question stands twice, or there are no questions.
    """
    return [entry["question_id"] for entry in _read_entries(path, {})["questions"]]


def require_same_questions(
    questions: Path, asked: Collection[int], annotations: Path, answered: Collection[int]
) -> None:
    """Refuse questions and annotations of different splits.

    Args:
        questions: file that the questions came from.
        asked: their ids.
        annotations: file that the annotations came from.
        answered: ids of the questions that they are about.

    Raises:
        DataError: the ids are not the same.
    """
    unanswered, unasked = len(set(asked) - set(answered)), len(set(answered) - set(asked))
    if unanswered or unasked:
        what = f"{unanswered} questions of {questions} without annotation, {unasked} annotations without question"
        raise DataError(f"{annotations}: {what} (give the files of one split)")


def read_questions(questions: Path, annotations: Path | None, folders: PictureFolders) -> list[Example]:
    """The questions of a split, each with its picture; ``record`` is a :class:`Question`.

    Pictures are ``COCO_<data_subtype>_<image id, 12 digits>.jpg``, or the digits alone; those of ``test-dev2015`` are
    among those of ``test2015``.

    Raises:
        DataError: a file is not an official one, or the two are not about the same questions and pictures.
    """
    value = _read_entries(questions, ASKED)
    entries = value["questions"]
    answered = {} if annotations is None else _answered(questions, entries, annotations)
    places = _pictures({entry["image_id"] for entry in entries}, value.get("data_subtype", ""), folders)
    found = []
    for entry in entries:
        record = _question(entry, answered.get(entry["question_id"]))
        found.append(Example(str(record.question_id), record, places[record.image_id], str(questions)))
    return found


def _read_entries(path: Path, more: Mapping[str, Check]) -> dict[str, Any]:
    """A file of questions, each of them with its id and ``more``."""
    value = read_json(path)
    check(path, value, questions_file(more))
    return value


def question_pictures(value: Any, folders: PictureFolders) -> Pictures:
    """Place and picture of every question in a file of them, but of those without an ``image_id``."""
    asked = [(place, entry["image_id"]) for place, entry in sound(value, "questions", fields({"image_id": WHOLE}))]
    subtype = value.get("data_subtype", "") if isinstance(value, dict) else ""
    places = _pictures({image_id for _, image_id in asked}, "" if SUBTYPE(subtype) else subtype, folders)
    return [(place, places[image_id][0]) for place, image_id in asked], []


def image_ids(value: Any, key: str) -> dict[int, int]:
    """The image of every question in a file of questions or annotations (``key``), by question id."""
    entries = sound(value, key, fields({"question_id": WHOLE, "image_id": WHOLE}))
    return {entry["question_id"]: entry["image_id"] for _, entry in entries}


def _answered(questions: Path, entries: list[dict[str, Any]], path: Path) -> dict[int, dict[str, Any]]:
    """The annotations of these questions, by question id."""
    annotations = read_annotations(path, LEARNT)
    answered = {annotation["question_id"]: annotation for annotation in annotations}
    asked = {entry["question_id"]: entry["image_id"] for entry in entries}
    require_same_questions(questions, asked, path, answered)
    other = [number for number, image in asked.items() if answered[number]["image_id"] != image]
    if other:
        what = f"{len(other)} questions about another image_id than in {questions}, first {other[0]}"
        raise DataError(f"{path}: {what} (give the files of one split)")
    return answered


def _pictures(image_ids: Collection[int], subtype: str, folders: PictureFolders) -> dict[int, tuple[Path, ...]]:
    """By image id, once for all questions about it."""
    prefix = f"COCO_{subtype.replace('-dev', '')}_"
    names = {image_id: f"{image_id:012d}.jpg" for image_id in image_ids}
    return {image_id: (folders.find(prefix + name, name),) for image_id, name in names.items()}


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
