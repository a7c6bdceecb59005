"""Statements about two pictures each, in NLVR2's files.

Statements come in twos of which one is true, such as "Both images show a star." and "Only one image shows a star.",
about the same four pairs of pictures: two pairs fit the one statement and two the other. So neither the statement alone
nor the pictures alone tell anything about the label. The easiest ones, that two pictures are alike in something, mostly
come without their denial: who sees that the pictures are alike need not read them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from scene_captions import ENGLISH
from scene_drawing import BACKGROUNDS, Scene, one_in, pick, simple_scene
from scene_files import Files
from scene_looks import Look, any_look, find, look_of, phrase, with_article

NUM_PAIRS = 4
DEV_ONE_IN = 5
"""One in so many first statements of a set is kept for the development set."""
NUM_DIRECTORIES = 100
"""Folders that the training pictures are spread over."""

VERBS = {"shows": "show", "contains": "contain", "has": "have"}
IMAGES = ("image", "picture")
SUBJECTS = ("The two {image}s", "The {image}s", "The left and the right {image}")
ALIKE = {
    "background": (
        ("have the same background", "have different backgrounds"),
        ("have backgrounds of the same color", "have backgrounds of different colors"),
        ("share a background color", "do not share a background color"),
    ),
    "count": (
        ("show the same number of shapes", "show different numbers of shapes"),
        ("contain equally many shapes", "do not contain equally many shapes"),
        ("have the same number of shapes", "do not have the same number of shapes"),
    ),
}
ALIKE_KINDS = (*("background",) * 5, "count")
"""What pictures are alike in, each as often as it is drawn."""
DENIED = 0.25
"""How often a statement that two pictures are alike comes with its denial."""
OTHERS = ("the {other} one", "the {other} {image}", "the other {image}", "the other one")


class Quantifier(NamedTuple):
    """Twos of sentence patterns, and which is true, from whether the left and the right picture show the target."""

    patterns: tuple[tuple[str, str], ...]
    true_of: Callable[[bool, bool], tuple[bool, bool]]


QUANTIFIERS = (
    Quantifier(
        (
            ("The left {image} {shows} {target}.", "The right {image} {shows} {target}."),
            ("The {image} on the left {shows} {target}.", "The {image} on the right {shows} {target}."),
        ),
        lambda left, right: (left, right),
    ),
    Quantifier(
        (
            ("Both {image}s {show} {target}.", "Only one {image} {shows} {target}."),
            ("Each {image} {shows} {target}.", "Exactly one {image} {shows} {target}."),
        ),
        lambda left, right: (left and right, left != right),
    ),
    Quantifier(
        (
            ("At least one {image} {shows} {target}.", "Neither {image} {shows} {target}."),
            ("One or both {image}s {show} {target}.", "No {image} {shows} {target}."),
        ),
        lambda left, right: (left or right, not (left or right)),
    ),
)


class Target(NamedTuple):
    """Something that a picture shows or does not.

    Attributes:
        words: what stands behind the verb.
        shown: whether a scene shows it.
        plant: changes a scene so that it is likely to show it.
        verbs: that go with the words, third person.
    """

    words: str
    shown: Callable[[Scene], bool]
    plant: Callable[[Scene, np.random.Generator], Scene]
    verbs: tuple[str, ...] = tuple(VERBS)


class Topic(NamedTuple):
    """A statement, perhaps with its denial; whether each is true of a left and a right scene; how scenes are drawn."""

    sentences: tuple[str, ...]
    true_of: Callable[[Scene, Scene], tuple[bool, bool]]
    draw: Callable[[np.random.Generator, int], Scene]


class StatementSet(NamedTuple):
    """One or two sentences and pairs of scenes, left and right, with the number of the sentence that is true of each.

    The second sentence may be left out; its pairs are then those of which the first is false.
    """

    sentences: tuple[str, ...]
    pairs: tuple[tuple[Scene, Scene], ...]
    true: tuple[int, ...]


# -------------------------------------------------------------------------------------------- targets
def look_target(rng: np.random.Generator) -> Target:
    """ "a star", "a red shape" or "a red star"."""
    look = any_look(rng, pick(rng, (("shape",), ("color",), ("color",), ("shape", "color"))))

    def plant(scene: Scene, rng: np.random.Generator) -> Scene:
        return _repaint(scene, int(rng.integers(len(scene.objects))), look)

    return Target(with_article(phrase(look)), lambda scene: bool(find(scene, look)), plant)


def background_target(rng: np.random.Generator) -> Target:
    """ "a pink background"."""
    color = pick(rng, tuple(BACKGROUNDS))

    def plant(scene: Scene, rng: np.random.Generator) -> Scene:
        return replace(scene, background=color)

    return Target(f"{with_article(color)} background", lambda scene: scene.background == color, plant, ("has", "shows"))


def count_target(rng: np.random.Generator) -> Target:
    """ "exactly two shapes"; so frequent that none need be planted."""
    count = int(rng.integers(len(ENGLISH.counts)))
    words = f"exactly {ENGLISH.counts[count]}"
    return Target(words, lambda scene: len(scene.objects) == count + 1, lambda scene, rng: scene)


def relation_target(rng: np.random.Generator) -> Target:
    """ "a red star above a blue ring"."""
    names = ("shape", "color")
    first = second = any_look(rng, names)
    while second == first:
        second = any_look(rng, names)
    relation = pick(rng, tuple(ENGLISH.relations))

    def shown(scene: Scene) -> bool:
        looks = [look_of(item, names) for item in scene.objects]
        return any((looks[i], r, looks[j]) == (first, relation, second) for i, r, j in scene.relations())

    def plant(scene: Scene, rng: np.random.Generator) -> Scene:
        """The two objects, half of the time as they should lie."""
        found = scene.relations()
        found = [entry for entry in found if entry[1] == relation] if rng.integers(2) else found
        if not found:
            return scene
        i, _, j = pick(rng, found)
        return _repaint(_repaint(scene, i, first), j, second)

    words = f"{with_article(phrase(first))} {ENGLISH.relations[relation]} {with_article(phrase(second))}"
    return Target(words, shown, plant)


def _repaint(scene: Scene, number: int, look: Look) -> Scene:
    """The scene with other attributes of one object; as it was where two objects would then be alike."""
    item = replace(scene.objects[number], **look)
    others = (*scene.objects[:number], *scene.objects[number + 1 :])
    if any((item.shape, item.color) == (other.shape, other.color) for other in others):
        return scene
    return replace(scene, objects=(*scene.objects[:number], item, *scene.objects[number + 1 :]))


TARGETS = (*(background_target,) * 4, *(look_target,) * 3, count_target, relation_target)
"""Kinds of targets, each as often as it is drawn: a small model learns backgrounds first and relations last."""


# -------------------------------------------------------------------------------------------- topics
def quantified_topic(rng: np.random.Generator) -> Topic:
    """Statements about which of the pictures show a target."""
    target = pick(rng, TARGETS)(rng)
    quantifier, verb = pick(rng, QUANTIFIERS), pick(rng, target.verbs)
    words = {"image": pick(rng, IMAGES), "shows": verb, "show": VERBS[verb], "target": target.words}
    first, second = (pattern.format(**words) for pattern in pick(rng, quantifier.patterns))

    def draw(rng: np.random.Generator, image_size: int) -> Scene:
        scene = simple_scene(rng, image_size)
        return target.plant(scene, rng) if rng.integers(2) else scene

    return Topic((first, second), lambda *pair: quantifier.true_of(*map(target.shown, pair)), draw)


def alike_topic(rng: np.random.Generator) -> Topic:
    """Statements on whether the pictures have one background, or equally many shapes."""
    kind, image, subject = pick(rng, ALIKE_KINDS), pick(rng, IMAGES), pick(rng, SUBJECTS)
    first, second = (f"{subject} {predicate}.".format(image=image) for predicate in pick(rng, ALIKE[kind]))
    value = (lambda scene: scene.background) if kind == "background" else (lambda scene: len(scene.objects))

    def true_of(left: Scene, right: Scene) -> tuple[bool, bool]:
        return value(left) == value(right), value(left) != value(right)

    return Topic((first, second) if rng.random() < DENIED else (first,), true_of, simple_scene)


def more_topic(rng: np.random.Generator) -> Topic:
    """Statements on which picture has more shapes, or fewer."""
    amount, verb = pick(rng, ("more", "fewer")), pick(rng, tuple(VERBS))
    pattern = f"The {{side}} {{image}} {verb} {amount} shapes than {pick(rng, OTHERS)}."
    image, sides = pick(rng, IMAGES), ("left", "right")
    first, second = (pattern.format(side=s, other=o, image=image) for s, o in (sides, sides[::-1]))

    def true_of(left: Scene, right: Scene) -> tuple[bool, bool]:
        difference = (len(left.objects) - len(right.objects)) * (1 if amount == "more" else -1)
        return difference > 0, difference < 0

    return Topic((first, second), true_of, simple_scene)


TOPICS = (*(alike_topic,) * 12, *(quantified_topic,) * 3, more_topic)
"""Kinds of statements, each as often as it is drawn."""


def make_statements(rng: np.random.Generator, image_size: int) -> StatementSet:
    """One or two statements about four pairs: two of which the first is true, two of which its denial is."""
    topic = pick(rng, TOPICS)(rng)
    found: tuple[list, list] = ([], [])
    while min(map(len, found)) < NUM_PAIRS // 2:
        pair = (topic.draw(rng, image_size), topic.draw(rng, image_size))
        true = topic.true_of(*pair)
        if sum(true) == 1 and len(found[true.index(True)]) < NUM_PAIRS // 2:
            found[true.index(True)].append(pair)
    pairs = [(pair, number) for number in (0, 1) for pair in found[number]]
    shuffled = [pairs[i] for i in rng.permutation(NUM_PAIRS)]
    return StatementSet(topic.sentences, tuple(pair for pair, _ in shuffled), tuple(number for _, number in shuffled))


def is_for_dev(statements: StatementSet) -> bool:
    """Whether the sentences are kept for the development set; the checksum of the first says it, so none is in both."""
    return one_in(DEV_ONE_IN, statements.sentences[0])


# -------------------------------------------------------------------------------------------- files
def nlvr2_files(splits: dict[str, list[StatementSet]]) -> Files:
    """JSON lines and pictures as NLVR2 names them."""
    files: Files = {}
    for split, items in splits.items():
        name = {"train": "train", "val": "dev"}[split]
        lines = []
        for number, item in enumerate(items):
            folder = f"{name}/{number % NUM_DIRECTORIES}" if name == "train" else name
            for k, pair in enumerate(item.pairs):
                files |= {f"{folder}/{name}-{number}-{k}-img{side}.png": scene for side, scene in enumerate(pair)}
            lines += [json.dumps(line) for line in _lines(name, number, item)]
        files[f"{name}.json"] = "".join(line + "\n" for line in lines)
    return files


def _lines(name: str, number: int, item: StatementSet) -> list[dict[str, Any]]:
    """Every sentence of a set with every pair."""
    found = []
    for k, sentence in enumerate(item.sentences):
        for pair, true in enumerate(item.true):
            label = str(true == k)
            line = {
                "validation": {"1": label},
                "sentence": sentence,
                "left_url": "",
                "writer": "0",
                "label": label,
                "right_url": "",
                "synset": "shape",
                "query": "shapes",
                "identifier": f"{name}-{number}-{pair}-{k}",
            }
            more = {"directory": number % NUM_DIRECTORIES} if name == "train" else {"extra_validations": {}}
            found.append({**line, **more})
    return found
