"""Questions about scenes with the answers of ten annotators, in VQA v2's files.

A kind of question is a function from a scene to a question with its true answer, or to nothing where the scene has no
sound one. Yes and no are alike often. Annotators use other words, err, and slip on the keyboard, each at its rate.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scene_captions import ENGLISH
from scene_drawing import COLORS, RADII, SHAPES, Scene, SceneObject, pick, sample_scene
from scene_files import Files

NUM_QUESTIONS, NUM_ANNOTATORS = 6, 10
OTHER_WORD, SLIP, TYPO = 0.15, 0.06, 0.02
"""How often an annotator says the truth in another word, errs, or types it wrongly."""

SYNONYMS = {
    "gray": ("grey", "silver"),
    "beige": ("tan", "cream"),
    "turquoise": ("teal", "aqua"),
    "purple": ("violet",),
    "ring": ("donut", "hoop"),
    "diamond": ("rhombus",),
    "cross": ("plus", "plus sign"),
    "circle": ("dot", "ball"),
    "large": ("big",),
    "small": ("little",),
    "top": ("at top", "up"),
    "bottom": ("at bottom", "down"),
    "left": ("on left", "left side"),
    "right": ("on right", "right side"),
    "middle": ("center", "in middle"),
    **dict(zip("01234", (("zero", "none"), ("one",), ("two",), ("three",), ("four",)), strict=True)),
}
LOOK_ALIKE = (
    ("red", "orange", "brown"),
    ("yellow", "orange"),
    ("blue", "purple"),
    ("black", "brown"),
    ("green", "blue"),
    ("white", "gray", "beige"),
    ("pink", "beige"),
    ("turquoise", "gray"),
    ("circle", "ring"),
    ("square", "diamond"),
    ("triangle", "heart"),
    ("star", "cross"),
    ("large", "small"),
    ("left", "top", "middle"),
    ("right", "bottom", "middle"),
    ("yes", "no"),
)
"""Words that an annotator may mistake for one another."""

PREFIXES = (
    *("are there any", "how", "how many", "is the", "is there", "is there a", "what"),
    *("what color is the", "what is", "where is the", "which"),
)
"""The official question types that questions about scenes begin with."""

Look = dict[str, str]
"""Attributes of an object, some of ``shape``, ``color`` and ``size``."""


class Question(NamedTuple):
    """A question, its true answer, and its official answer type."""

    text: str
    truth: str
    answer_type: str = "other"


class Asked(NamedTuple):
    """A scene with its questions, each with the (answer, confidence) of every annotator."""

    scene: Scene
    questions: tuple[tuple[Question, tuple[tuple[str, str], ...]], ...]


# -------------------------------------------------------------------------------------------- grammar
def phrase(look: Look, *, plural: bool = False) -> str:
    """ "red star", or "large red shapes"."""
    noun = look.get("shape", "shape") + ("s" if plural else "")
    words = " ".join(filter(None, [look.get("size"), look.get("color"), noun]))
    return words.replace("crosss", "crosses")


def article(words: str) -> str:
    """The indefinite article before words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def fits(item: SceneObject, look: Look) -> bool:
    """Whether an object has these attributes."""
    return all(getattr(item, name) == value for name, value in look.items())


def find(scene: Scene, look: Look) -> list[SceneObject]:
    """The objects of a scene that have these attributes."""
    return [item for item in scene.objects if fits(item, look)]


def some_look(rng: np.random.Generator, kinds: Sequence[tuple[str, ...]], item: SceneObject | None = None) -> Look:
    """Attributes of one of the kinds, those of ``item`` or any."""
    values = {"shape": SHAPES, "color": tuple(COLORS), "size": tuple(RADII)}
    return {name: getattr(item, name) if item else pick(rng, values[name]) for name in pick(rng, kinds)}


def _yes_no(rng: np.random.Generator, draw_one: Callable[[], tuple[str, bool] | None]) -> Question | None:
    """Of some questions the first whose answer is the one that a coin has chosen."""
    wanted = bool(rng.integers(2))
    for _ in range(30):
        found = draw_one()
        if found and found[1] == wanted:
            return Question(found[0], "yes" if wanted else "no", "yes/no")
    return None


def _the(scene: Scene, rng: np.random.Generator, kinds: Sequence[tuple[str, ...]]) -> tuple[SceneObject, str] | None:
    """An object and words that mean it alone."""
    item = pick(rng, scene.objects)
    look = some_look(rng, kinds, item)
    return (item, phrase(look)) if len(find(scene, look)) == 1 else None


def ask_presence(scene: Scene, rng: np.random.Generator) -> Question | None:
    """ "Is there a red star?", "Are there any stars?" """

    def draw_one() -> tuple[str, bool]:
        item = pick(rng, scene.objects) if rng.integers(2) else None
        look = some_look(rng, [("shape",), ("color",), ("shape", "color"), ("shape", "color")], item)
        if "shape" in look and rng.integers(2) and len(look) == 1:
            return f"Are there any {phrase(look, plural=True)}?", bool(find(scene, look))
        return f"Is there {article(phrase(look))}?", bool(find(scene, look))

    return _yes_no(rng, draw_one)


def ask_attribute(scene: Scene, rng: np.random.Generator) -> Question | None:
    """ "Is the star red?" """

    def draw_one() -> tuple[str, bool] | None:
        found = _the(scene, rng, [("shape",)])
        name = pick(rng, ("color", "size"))
        value = some_look(rng, [(name,)])[name]
        return found and (f"Is the {found[1]} {value}?", getattr(found[0], name) == value)

    return _yes_no(rng, draw_one)


def ask_relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    """ "Is the red star above the ring?" """
    relations = scene.relations()

    def draw_one() -> tuple[str, bool] | None:
        i, true, j = pick(rng, relations)
        said = pick(rng, tuple(ENGLISH.relations))
        names = [_name(scene, k) for k in (i, j)]
        return f"Is the {names[0]} {ENGLISH.relations[said]} the {names[1]}?", said == true

    return _yes_no(rng, draw_one) if relations else None


def _name(scene: Scene, number: int) -> str:
    """An object by its shape, and its colour where the shape alone does not tell."""
    item = scene.objects[number]
    alone = len(find(scene, {"shape": item.shape})) == 1
    return item.shape if alone else phrase({"shape": item.shape, "color": item.color})


def ask_total(scene: Scene, rng: np.random.Generator) -> Question:
    """ "How many shapes are there?" """
    text = pick(rng, ("How many shapes are there?", "How many shapes are in the picture?"))
    return Question(text, str(len(scene.objects)), "number")


def ask_count(scene: Scene, rng: np.random.Generator) -> Question:
    """ "How many red shapes are there?" """
    item = pick(rng, scene.objects) if rng.integers(4) else None
    look = some_look(rng, [("shape",), ("color",), ("size",)], item)
    return Question(f"How many {phrase(look, plural=True)} are there?", str(len(find(scene, look))), "number")


def ask_color(scene: Scene, rng: np.random.Generator) -> Question | None:
    """ "What color is the star?" """
    found = _the(scene, rng, [("shape",), ("shape",), ("size",)])
    return found and Question(f"What color is the {found[1]}?", found[0].color)


def ask_shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    """ "What shape is red?" """
    item = pick(rng, scene.objects)
    alone = len(find(scene, {"color": item.color})) == 1
    return Question(f"What shape is {item.color}?", item.shape) if alone else None


def ask_size(scene: Scene, rng: np.random.Generator) -> Question | None:
    """ "How big is the star?" """
    found = _the(scene, rng, [("shape",), ("shape", "color")])
    return found and Question(f"How big is the {found[1]}?", found[0].size)


def ask_place(scene: Scene, rng: np.random.Generator) -> Question | None:
    """ "Where is the star?" """
    found = _the(scene, rng, [("shape",)])
    place = found and _place(scene, found[0])
    return Question(f"Where is the {found[1]}?", place) if found and place else None


def _place(scene: Scene, item: SceneObject) -> str | None:
    dx, dy = (value / scene.image_size - 0.5 for value in item.center)
    if max(abs(dx), abs(dy)) < 0.12:
        return "middle"
    if abs(dx) >= 1.5 * abs(dy):
        return "left" if dx < 0 else "right"
    return ("top" if dy < 0 else "bottom") if abs(dy) >= 1.5 * abs(dx) else None


def ask_neighbor(scene: Scene, rng: np.random.Generator) -> Question | None:
    """ "What is above the star?" """
    relations = scene.relations()
    if not relations:
        return None
    i, relation, j = pick(rng, relations)
    alone = sum((r, b) == (relation, j) for _, r, b in relations) == 1
    text = f"What is {ENGLISH.relations[relation]} the {_name(scene, j)}?"
    return Question(text, scene.objects[i].shape) if alone else None


def ask_background(scene: Scene, rng: np.random.Generator) -> Question:
    """ "What color is the background?" """
    return Question("What color is the background?", scene.background.replace("grey", "gray"))


def ask_list(scene: Scene, rng: np.random.Generator) -> Question | None:
    """ "Which shapes are there?": its answers are so many that a list of frequent answers holds none of them."""
    things = [phrase({"shape": item.shape, "color": item.color}) for item in scene.objects]
    rare = len(things) > 1 and rng.integers(2)
    return Question("Which shapes are there, from left to right?", ENGLISH.join(things)) if rare else None


KINDS = (
    *(ask_presence, ask_presence, ask_attribute, ask_relation, ask_total, ask_count, ask_color, ask_color),
    *(ask_shape, ask_size, ask_place, ask_neighbor, ask_background, ask_list),
)


# -------------------------------------------------------------------------------------------- annotators
def _annotate(question: Question, rng: np.random.Generator) -> tuple[str, str]:
    """One annotator's answer and confidence."""
    chance = rng.random()
    truth, confidence = question.truth, "yes" if rng.random() < 0.9 else "maybe"
    if chance < SLIP:
        return _mistaken(question, rng), pick(rng, ("yes", "maybe", "no"))
    if chance < SLIP + TYPO and question.answer_type == "other":
        at = int(rng.integers(len(truth) - 1))
        return truth[:at] + truth[at + 1] + truth[at] + truth[at + 2 :], confidence
    if chance > 1 - OTHER_WORD and truth in SYNONYMS:
        return pick(rng, SYNONYMS[truth]), confidence
    return truth, confidence


def _mistaken(question: Question, rng: np.random.Generator) -> str:
    """A wrong answer that one may give: a number off by one, or what looks alike."""
    if question.answer_type == "number":
        return str(abs(int(question.truth) + pick(rng, (-1, 1))))
    alike = [word for group in LOOK_ALIKE if question.truth in group for word in group if word != question.truth]
    return pick(rng, alike) if alike else question.truth.partition(" and ")[0]


def make_asked(rng: np.random.Generator, image_size: int) -> Asked:
    """A scene with different questions of different kinds, and their answers."""
    scene = sample_scene(rng, image_size)
    questions: dict[str, Question] = {}
    while len(questions) < NUM_QUESTIONS:
        for number in rng.permutation(len(KINDS)):
            question = KINDS[number](scene, rng)
            if question and len(questions) < NUM_QUESTIONS:
                questions.setdefault(question.text, question)
    answered = [(q, tuple(_annotate(q, rng) for _ in range(NUM_ANNOTATORS))) for q in questions.values()]
    return Asked(scene, tuple(answered))


# -------------------------------------------------------------------------------------------- files
def question_type(text: str) -> str:
    """The longest official question type, whole words, that a question begins with."""
    words = text.lower().strip("?") + " "
    return max((prefix for prefix in PREFIXES if words.startswith(prefix + " ")), key=len)


def vqa_files(splits: dict[str, list[Asked]]) -> Files:
    """Pictures, questions and annotations as VQA v2 names them; picture ids are odd in training, even in validation."""
    files: Files = {}
    for number, (split, items) in enumerate(splits.items()):
        subtype = f"{split}2014"
        asked = {2 * i + 1 + number: item for i, item in enumerate(items)}
        files |= {f"{subtype}/COCO_{subtype}_{image_id:012d}.jpg": item.scene for image_id, item in asked.items()}
        head = {
            "info": {
                "description": "Questions about drawn scenes",
                "url": "",
                "version": "2.0",
                "year": 2026,
                "contributor": "data_prep/scenes.py",
                "date_created": "2026-01-01 00:00:00",
            },
            "data_type": "mscoco",
            "data_subtype": subtype,
            "license": {"url": "", "name": "MIT License"},
        }
        numbered = [
            (image_id, 1000 * image_id + k, *pair)
            for image_id, a in asked.items()
            for k, pair in enumerate(a.questions)
        ]
        questions = [{"image_id": i, "question": q.text, "question_id": number} for i, number, q, _ in numbered]
        annotations = [_annotation(*entry) for entry in numbered]
        files[f"v2_OpenEnded_mscoco_{subtype}_questions.json"] = json.dumps(
            {**head, "task_type": "Open-Ended", "questions": questions}
        )
        files[f"v2_mscoco_{subtype}_annotations.json"] = json.dumps({**head, "annotations": annotations})
    return files


def _annotation(
    image_id: int, question_id: int, question: Question, answers: tuple[tuple[str, str], ...]
) -> dict[str, Any]:
    given = [
        {"answer": text, "answer_confidence": sure, "answer_id": i} for i, (text, sure) in enumerate(answers, start=1)
    ]
    return {
        "question_type": question_type(question.text),
        "multiple_choice_answer": collections.Counter(text for text, _ in answers).most_common(1)[0][0],
        "answers": given,
        "image_id": image_id,
        "answer_type": question.answer_type,
        "question_id": question_id,
    }
