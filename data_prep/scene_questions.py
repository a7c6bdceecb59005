"""Questions about scenes with their true answers.

A kind of question is a function from a scene to a question, or to nothing where the scene has no sound one. A coin says
whether the answer to a question of a kind is yes or no, so that its words alone do not tell.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scene_captions import ENGLISH
from scene_drawing import BACKGROUNDS, CLEAR, Scene, SceneObject, pick
from scene_looks import VALUES, any_look, find, look_of, phrase, with_article

MIDDLE = 0.12
"""A shape nearer to the picture's middle than this share of its side is there."""
BACKGROUND_QUESTIONS = (
    "What color is the background?",
    "What is the color of the background?",
    "What is the background color?",
    "Which color is the background?",
)


class Question(NamedTuple):
    """A question, its true answer, and its official answer type."""

    text: str
    answer: str
    answer_type: str = "other"


def ask_presence(scene: Scene, rng: np.random.Generator) -> Question:
    """ "Is there a red star?", "Are there any stars?"; what is not there differs from what is in one attribute."""
    names = pick(rng, (("shape",), ("color",), ("shape", "color"), ("shape", "color")))
    look, present = look_of(pick(rng, scene.objects), names), bool(rng.integers(2))
    while not present and find(scene, look):
        look = look_of(pick(rng, scene.objects), names) | any_look(rng, [pick(rng, names)])
    several = names == ("shape",) and rng.integers(2)
    words = f"Are there any {phrase(look, plural=True)}?" if several else f"Is there {with_article(phrase(look))}?"
    return _yes_or_no(words, present)


def ask_attribute(scene: Scene, rng: np.random.Generator) -> Question | None:
    """ "Is the star red?" """
    item, name, true = pick(rng, scene.objects), pick(rng, ("color", "size")), bool(rng.integers(2))
    value = getattr(item, name)
    said = value if true else pick(rng, [other for other in VALUES[name] if other != value])
    alone = _is_alone(scene, item, "shape")
    return _yes_or_no(f"Is the {item.shape} {said}?", true) if alone else None


def ask_relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    """ "Is the red star above the ring?" """
    relations = scene.relations()
    if not relations:
        return None
    (i, relation, j), true = pick(rng, relations), bool(rng.integers(2))
    said = relation if true else pick(rng, [other for other in ENGLISH.relations if other != relation])
    return _yes_or_no(f"Is the {_name(scene, i)} {ENGLISH.relations[said]} the {_name(scene, j)}?", true)


def ask_total(scene: Scene, rng: np.random.Generator) -> Question:
    """ "How many shapes are there?" """
    text = pick(rng, ("How many shapes are there?", "How many shapes are in the picture?"))
    return Question(text, str(len(scene.objects)), "number")


def ask_count(scene: Scene, rng: np.random.Generator) -> Question:
    """ "How many red shapes are there?"; mostly of what is there."""
    names = [pick(rng, tuple(VALUES))]
    look = look_of(pick(rng, scene.objects), names) if rng.integers(4) else any_look(rng, names)
    return Question(f"How many {phrase(look, plural=True)} are there?", str(len(find(scene, look))), "number")


def ask_color(scene: Scene, rng: np.random.Generator) -> Question | None:
    """ "What color is the star?" """
    item, name = pick(rng, scene.objects), pick(rng, ("shape", "shape", "size"))
    words = phrase(look_of(item, [name]))
    return Question(f"What color is the {words}?", item.color) if _is_alone(scene, item, name) else None


def ask_shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    """ "What shape is red?" """
    item = pick(rng, scene.objects)
    return Question(f"What shape is {item.color}?", item.shape) if _is_alone(scene, item, "color") else None


def ask_size(scene: Scene, rng: np.random.Generator) -> Question:
    """ "How big is the star?" """
    i = int(rng.integers(len(scene.objects)))
    return Question(f"How big is the {_name(scene, i)}?", scene.objects[i].size)


def ask_place(scene: Scene, rng: np.random.Generator) -> Question | None:
    """ "Where is the star?" """
    i = int(rng.integers(len(scene.objects)))
    place = _place(scene, scene.objects[i])
    return Question(f"Where is the {_name(scene, i)}?", place) if place else None


def ask_neighbor(scene: Scene, rng: np.random.Generator) -> Question | None:
    """ "What is above the star?", where it is one shape only."""
    relations = scene.relations()
    if not relations:
        return None
    i, relation, j = pick(rng, relations)
    alone = sum(entry[1:] == (relation, j) for entry in relations) == 1
    text = f"What is {ENGLISH.relations[relation]} the {_name(scene, j)}?"
    return Question(text, scene.objects[i].shape) if alone else None


def ask_background(scene: Scene, rng: np.random.Generator) -> Question:
    """ "What color is the background?", "What color is behind the star?" """
    behind = f"What color is behind the {_name(scene, int(rng.integers(len(scene.objects))))}?"
    return Question(pick(rng, (*BACKGROUND_QUESTIONS, behind)), scene.background.replace("grey", "gray"))


def ask_if_background(scene: Scene, rng: np.random.Generator) -> Question:
    """ "Is the background pink?" """
    true = bool(rng.integers(2))
    said = scene.background if true else pick(rng, [other for other in BACKGROUNDS if other != scene.background])
    return _yes_or_no(f"Is the background {said.replace('grey', 'gray')}?", true)


def ask_list(scene: Scene, rng: np.random.Generator) -> Question | None:
    """ "Which shapes are there?", now and then.

    Its answers, such as "red star and blue ring", are so many that none is frequent enough for a list of answers.
    """
    if len(scene.objects) == 1 or rng.integers(2):
        return None
    things = [phrase(look_of(item, ("shape", "color"))) for item in scene.objects]
    return Question("Which shapes are there, from left to right?", ENGLISH.join(things))


KINDS = (
    *(*(ask_background,) * 6, *(ask_color,) * 6, *(ask_total,) * 3, ask_if_background, ask_presence, ask_attribute),
    *(ask_count, ask_shape, ask_size, ask_place, ask_relation, ask_neighbor, ask_list),
)
"""Kinds of questions, each as often as it is tried: from what a small model learns at once to what it hardly does."""


def ask(scene: Scene, rng: np.random.Generator, num_questions: int) -> list[Question]:
    """Different questions about a scene, their kinds by lot, as often as they stand in :data:`KINDS`."""
    found: dict[str, Question] = {}
    while len(found) < num_questions:
        for i in rng.permutation(len(KINDS)):
            question = KINDS[i](scene, rng)
            if question and len(found) < num_questions:
                found.setdefault(question.text, question)
    return list(found.values())


def _yes_or_no(text: str, answer: bool) -> Question:
    return Question(text, "yes" if answer else "no", "yes/no")


def _is_alone(scene: Scene, item: SceneObject, name: str) -> bool:
    """Whether no other object has this attribute of an object."""
    return len(find(scene, look_of(item, [name]))) == 1


def _name(scene: Scene, number: int) -> str:
    """An object by its shape, and by its colour where the shape alone does not tell."""
    item = scene.objects[number]
    return phrase(look_of(item, ["shape"] if _is_alone(scene, item, "shape") else ["shape", "color"]))


def _place(scene: Scene, item: SceneObject) -> str | None:
    """Where in the picture an object lies; none where two words would fit."""
    dx, dy = (value / scene.image_size - 0.5 for value in item.center)
    if max(abs(dx), abs(dy)) < MIDDLE:
        return "middle"
    if abs(dx) >= CLEAR * abs(dy):
        return "left" if dx < 0 else "right"
    return ("top" if dy < 0 else "bottom") if abs(dy) >= CLEAR * abs(dx) else None
