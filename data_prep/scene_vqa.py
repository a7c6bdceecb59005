"""Questions about scenes with the answers of ten annotators, in VQA v2's files.

Annotators use other words, mistake a thing for another and slip on the keyboard, each at its rate.
"""

from __future__ import annotations

import collections
import json
from typing import Any, NamedTuple

import numpy as np
from scene_drawing import Scene, pick, simple_scene
from scene_files import Files, numbered
from scene_questions import Question, ask

NUM_QUESTIONS, NUM_ANNOTATORS = 6, 10
OTHER_WORD, MISTAKE, TYPO = 0.15, 0.06, 0.02
"""How often an annotator says the truth in another word where there is one, errs, or types "other" answers wrongly."""
UNSURE = 0.1
"""How often an annotator who is right is not sure of it."""

OTHER_WORDS = {
    "gray": ("grey", "silver"),
    "beige": ("tan", "cream"),
    "turquoise": ("teal", "aqua"),
    "purple": ("violet",),
    "circle": ("dot", "ball"),
    "ring": ("donut", "hoop"),
    "cross": ("plus", "plus sign"),
    "diamond": ("rhombus",),
    "large": ("big",),
    "small": ("little",),
    "left": ("on left", "left side"),
    "right": ("on right", "right side"),
    "top": ("at top", "up"),
    "bottom": ("at bottom", "down"),
    "middle": ("center", "in middle"),
    **dict(zip("01234", (("zero", "none"), ("one",), ("two",), ("three",), ("four",)), strict=True)),
}
TAKEN_FOR = {
    "yes": ("no",),
    "no": ("yes",),
    "red": ("orange", "brown"),
    "orange": ("red", "yellow"),
    "yellow": ("orange",),
    "green": ("blue",),
    "blue": ("purple", "green"),
    "purple": ("blue",),
    "brown": ("black", "red"),
    "black": ("brown",),
    "white": ("gray", "beige"),
    "gray": ("white", "turquoise"),
    "pink": ("beige",),
    "beige": ("white", "pink"),
    "turquoise": ("gray", "blue"),
    "circle": ("ring",),
    "ring": ("circle",),
    "square": ("diamond",),
    "diamond": ("square",),
    "triangle": ("heart",),
    "heart": ("triangle",),
    "star": ("cross",),
    "cross": ("star",),
    "small": ("large",),
    "large": ("small",),
    "left": ("right", "middle"),
    "right": ("left", "middle"),
    "top": ("left", "middle"),
    "bottom": ("right", "middle"),
    "middle": ("left", "right"),
}
PREFIXES = (
    *("are there any", "how", "how many", "is the", "is there", "is there a", "what", "what color is"),
    *("what color is the", "what is", "what is the", "what is the color of the", "where is the", "which"),
)
"""The official question types that questions about scenes can have."""


class Answer(NamedTuple):
    """An annotator's words, and whether they were sure of them: yes, maybe or no."""

    text: str
    confidence: str


class Asked(NamedTuple):
    """A scene with questions and, for each of them, the answers of all annotators."""

    scene: Scene
    questions: tuple[tuple[Question, tuple[Answer, ...]], ...]


def make_asked(rng: np.random.Generator, image_size: int) -> Asked:
    """A scene with questions and answers by lot."""
    scene = simple_scene(rng, image_size)
    questions = ask(scene, rng, NUM_QUESTIONS)
    return Asked(scene, tuple((q, tuple(annotate(q, rng) for _ in range(NUM_ANNOTATORS))) for q in questions))


def annotate(question: Question, rng: np.random.Generator) -> Answer:
    """The answer of one annotator."""
    chance, true = rng.random(), question.answer
    if chance < MISTAKE:
        return Answer(_mistaken(question, rng), pick(rng, ("yes", "maybe", "no")))
    confidence = "maybe" if rng.random() < UNSURE else "yes"
    if chance < MISTAKE + TYPO and question.answer_type == "other":
        at = int(rng.integers(len(true) - 1))
        return Answer(true[:at] + true[at + 1] + true[at] + true[at + 2 :], confidence)
    if chance > 1 - OTHER_WORD and true in OTHER_WORDS:
        return Answer(pick(rng, OTHER_WORDS[true]), confidence)
    return Answer(true, confidence)


def _mistaken(question: Question, rng: np.random.Generator) -> str:
    """A number off by one, what looks alike, or of a list the first part only."""
    if question.answer_type == "number":
        return str(abs(int(question.answer) + pick(rng, (-1, 1))))
    alike = TAKEN_FOR.get(question.answer)
    return pick(rng, alike) if alike else question.answer.partition(" and ")[0]


def question_type(text: str) -> str:
    """The longest official question type that a question begins with, in whole words."""
    words = text.lower().rstrip("?") + " "
    return max((prefix for prefix in PREFIXES if words.startswith(prefix + " ")), key=len)


def vqa_files(splits: dict[str, list[Asked]]) -> Files:
    """Pictures, questions and annotations as VQA v2 names them; picture ids are odd in training, even in validation."""
    files: Files = {}
    for number, (split, items) in enumerate(splits.items()):
        subtype, entries = f"{split}2014", []
        for image_id, item in numbered(items, number).items():
            files[f"{subtype}/COCO_{subtype}_{image_id:012d}.jpg"] = item.scene
            entries += [(image_id, 1000 * image_id + k, *pair) for k, pair in enumerate(item.questions)]
        questions = [{"image_id": image, "question": q.text, "question_id": id} for image, id, q, _ in entries]
        annotations = [_annotation(*entry) for entry in entries]
        files |= {
            f"v2_OpenEnded_mscoco_{subtype}_questions.json": _file(
                subtype, {"task_type": "Open-Ended", "questions": questions}
            ),
            f"v2_mscoco_{subtype}_annotations.json": _file(subtype, {"annotations": annotations}),
        }
    return files


def _file(subtype: str, more: dict[str, Any]) -> str:
    info = {
        "description": "Questions about drawn scenes",
        "url": "",
        "version": "2.0",
        "year": 2026,
        "contributor": "data_prep/scenes.py",
        "date_created": "2026-01-01 00:00:00",
    }
    license_ = {"url": "", "name": "MIT License"}
    return json.dumps({"info": info, "data_type": "mscoco", "data_subtype": subtype, "license": license_, **more})


def _annotation(image_id: int, question_id: int, question: Question, answers: tuple[Answer, ...]) -> dict[str, Any]:
    given = [
        {"answer": text, "answer_confidence": confidence, "answer_id": i}
        for i, (text, confidence) in enumerate(answers, start=1)
    ]
    return {
        "question_type": question_type(question.text),
        "multiple_choice_answer": collections.Counter(answer.text for answer in answers).most_common(1)[0][0],
        "answers": given,
        "image_id": image_id,
        "answer_type": question.answer_type,
        "question_id": question_id,
    }
