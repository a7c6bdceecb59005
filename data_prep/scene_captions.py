"""Captions of scenes in English, German, French, Spanish and Chinese.

A language is a table of words and sentence patterns; nouns carry their gender, and articles and adjectives follow it.
Objects are always named in the order of the scene, from left to right, so that a picture tells each word.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scene_drawing import BACKGROUNDS, COLORS, RADII, Scene, SceneObject, pick

Forms = dict[tuple[bool, bool], dict[str, str]]
"""(definite, behind a relation) to gender to word or ending."""


@dataclass(frozen=True)
class Language:
    """Words and patterns of one language.

    Attributes:
        nouns: shape to "gender noun".
        adjectives: sizes and colours; "masculine|feminine" where the two differ, or a stem when there are ``endings``.
        grounds: background colours in the form that ``ground`` wants.
        articles: of every form; a preposition that ends the relation is part of it.
        endings: of adjectives; empty where gender alone decides.
        relations: the words between two objects.
        counts: "one shape" to "four shapes".
        phrase, ground: patterns of an object and of the background.
        listing, counting, relating, stating: patterns of the four kinds of caption.
        comma, last: what joins the objects of a list.
    """

    nouns: dict[str, str]
    adjectives: dict[str, str]
    grounds: dict[str, str]
    articles: Forms
    endings: Forms
    relations: dict[str, str]
    counts: tuple[str, str, str, str]
    phrase: str
    ground: str
    listing: str
    counting: str
    relating: str
    stating: str
    comma: str
    last: str

    def name(self, item: SceneObject, definite: bool = False, related: bool = False) -> str:
        """An object in words: "a large red circle"; ``related``: in the form that follows a relation."""
        gender, noun = self.nouns[item.shape].split(" ")
        form = (definite, related)
        size, color = (self._agree(self.adjectives[word], gender, form) for word in (item.size, item.color))
        return self.phrase.format(article=self.articles[form][gender], size=size, color=color, noun=noun)

    def _agree(self, adjective: str, gender: str, form: tuple[bool, bool]) -> str:
        if self.endings:
            return adjective + self.endings[form][gender]
        masculine, _, feminine = adjective.partition("|")
        return feminine if gender == "f" and feminine else masculine

    def join(self, names: list[str]) -> str:
        """ "a, b and c"."""
        return self.last.join(filter(None, [self.comma.join(names[:-1]), names[-1]]))


def caption(scene: Scene, language: str, rng: np.random.Generator) -> str:
    """A true caption: a list of all objects, a counted list, or how two objects lie, as a phrase or as a sentence.

    Args:
        language: among ``LANGUAGES``.
        rng: picks the kind of caption and the two objects.
    """
    words = LANGUAGES[language]
    relations = scene.relations()
    kind = pick(rng, ("listing", "counting", "relating", "stating") if relations else ("listing", "counting"))
    ground = words.ground.format(color=words.grounds[scene.background])
    if kind in ("listing", "counting"):
        things = words.join([words.name(o) for o in scene.objects])
        count = words.counts[len(scene.objects) - 1]
        return getattr(words, kind).format(things=things, count=count, ground=ground)
    first, relation, second = pick(rng, relations)
    definite = kind == "stating"
    return getattr(words, kind).format(
        subject=words.name(scene.objects[first], definite),
        relation=words.relations[relation],
        object=words.name(scene.objects[second], definite, related=True),
        ground=ground,
    )


ENGLISH = Language(
    nouns={
        "circle": "m circle",
        "square": "m square",
        "triangle": "m triangle",
        "star": "m star",
        "ring": "m ring",
        "heart": "m heart",
        "cross": "m cross",
        "diamond": "m diamond",
    },
    adjectives={word: word for word in (*RADII, *COLORS)},
    grounds={word: word for word in BACKGROUNDS},
    articles={(d, r): {"m": "the" if d else "a"} for d in (False, True) for r in (False, True)},
    endings={},
    relations={"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"},
    counts=("one shape", "two shapes", "three shapes", "four shapes"),
    phrase="{article} {size} {color} {noun}",
    ground="on a {color} background",
    listing="{things} {ground}",
    counting="{count} {ground}: {things}",
    relating="{subject} {relation} {object} {ground}",
    stating="{subject} is {relation} {object}",
    comma=", ",
    last=" and ",
)

GERMAN = Language(
    nouns={
        "circle": "m Kreis",
        "square": "n Quadrat",
        "triangle": "n Dreieck",
        "star": "m Stern",
        "ring": "m Ring",
        "heart": "n Herz",
        "cross": "n Kreuz",
        "diamond": "f Raute",
    },
    adjectives={
        "small": "klein",
        "large": "groß",
        "red": "rot",
        "orange": "orangefarben",
        "yellow": "gelb",
        "green": "grün",
        "blue": "blau",
        "purple": "violett",
        "brown": "braun",
        "black": "schwarz",
    },
    grounds={
        "white": "weißem",
        "grey": "grauem",
        "pink": "rosafarbenem",
        "beige": "beigefarbenem",
        "turquoise": "türkisfarbenem",
    },
    articles={
        (False, False): {"m": "ein", "f": "eine", "n": "ein"},
        (True, False): {"m": "der", "f": "die", "n": "das"},
        (False, True): {"m": "einem", "f": "einer", "n": "einem"},
        (True, True): {"m": "dem", "f": "der", "n": "dem"},
    },
    endings={
        (False, False): {"m": "er", "f": "e", "n": "es"},
        (True, False): {"m": "e", "f": "e", "n": "e"},
        (False, True): {"m": "en", "f": "en", "n": "en"},
        (True, True): {"m": "en", "f": "en", "n": "en"},
    },
    relations={"left of": "links von", "right of": "rechts von", "above": "über", "below": "unter"},
    counts=("eine Form", "zwei Formen", "drei Formen", "vier Formen"),
    phrase="{article} {size} {color} {noun}",
    ground="auf {color} Hintergrund",
    listing="{things} {ground}",
    counting="{count} {ground}: {things}",
    relating="{subject} {relation} {object} {ground}",
    stating="{subject} ist {relation} {object}",
    comma=", ",
    last=" und ",
)

FRENCH = Language(
    nouns={
        "circle": "m cercle",
        "square": "m carré",
        "triangle": "m triangle",
        "star": "f étoile",
        "ring": "m anneau",
        "heart": "m cœur",
        "cross": "f croix",
        "diamond": "m losange",
    },
    adjectives={
        "small": "petit|petite",
        "large": "grand|grande",
        "red": "rouge",
        "orange": "orange",
        "yellow": "jaune",
        "green": "vert|verte",
        "blue": "bleu|bleue",
        "purple": "violet|violette",
        "brown": "marron",
        "black": "noir|noire",
    },
    grounds={"white": "blanc", "grey": "gris", "pink": "rose", "beige": "beige", "turquoise": "turquoise"},
    articles={
        (False, False): {"m": "un", "f": "une"},
        (True, False): {"m": "le", "f": "la"},
        (False, True): {"m": "d'un", "f": "d'une"},
        (True, True): {"m": "du", "f": "de la"},
    },
    endings={},
    relations={"left of": "à gauche", "right of": "à droite", "above": "au-dessus", "below": "au-dessous"},
    counts=("une forme", "deux formes", "trois formes", "quatre formes"),
    phrase="{article} {size} {noun} {color}",
    ground="sur fond {color}",
    listing="{things} {ground}",
    counting="{count} {ground} : {things}",
    relating="{subject} {relation} {object} {ground}",
    stating="{subject} est {relation} {object}",
    comma=", ",
    last=" et ",
)

SPANISH = Language(
    nouns={
        "circle": "m círculo",
        "square": "m cuadrado",
        "triangle": "m triángulo",
        "star": "f estrella",
        "ring": "m anillo",
        "heart": "m corazón",
        "cross": "f cruz",
        "diamond": "m rombo",
    },
    adjectives={
        "small": "pequeño|pequeña",
        "large": "grande",
        "red": "rojo|roja",
        "orange": "naranja",
        "yellow": "amarillo|amarilla",
        "green": "verde",
        "blue": "azul",
        "purple": "morado|morada",
        "brown": "marrón",
        "black": "negro|negra",
    },
    grounds={"white": "blanco", "grey": "gris", "pink": "rosa", "beige": "beige", "turquoise": "turquesa"},
    articles={
        (False, False): {"m": "un", "f": "una"},
        (True, False): {"m": "el", "f": "la"},
        (False, True): {"m": "de un", "f": "de una"},
        (True, True): {"m": "del", "f": "de la"},
    },
    endings={},
    relations={"left of": "a la izquierda", "right of": "a la derecha", "above": "encima", "below": "debajo"},
    counts=("una figura", "dos figuras", "tres figuras", "cuatro figuras"),
    phrase="{article} {noun} {color} {size}",
    ground="sobre fondo {color}",
    listing="{things} {ground}",
    counting="{count} {ground}: {things}",
    relating="{subject} {relation} {object} {ground}",
    stating="{subject} está {relation} {object}",
    comma=", ",
    last=" y ",
)

CHINESE = Language(
    nouns={
        "circle": "m 圆形",
        "square": "m 正方形",
        "triangle": "m 三角形",
        "star": "m 星形",
        "ring": "m 圆环",
        "heart": "m 心形",
        "cross": "m 十字形",
        "diamond": "m 菱形",
    },
    adjectives={
        "small": "小",
        "large": "大",
        "red": "红色",
        "orange": "橙色",
        "yellow": "黄色",
        "green": "绿色",
        "blue": "蓝色",
        "purple": "紫色",
        "brown": "棕色",
        "black": "黑色",
    },
    grounds={"white": "白色", "grey": "灰色", "pink": "粉色", "beige": "米色", "turquoise": "青色"},
    articles={(d, r): {"m": "" if d else "一个"} for d in (False, True) for r in (False, True)},
    endings={},
    relations={"left of": "左边", "right of": "右边", "above": "上方", "below": "下方"},
    counts=("一个图形", "两个图形", "三个图形", "四个图形"),
    phrase="{article}{color}{size}{noun}",
    ground="{color}背景上",
    listing="{ground}有{things}",
    counting="{ground}有{count}：{things}",
    relating="{ground}，{subject}在{object}的{relation}",
    stating="{subject}在{object}的{relation}",
    comma="、",
    last="和",
)

LANGUAGES = {"en": ENGLISH, "de": GERMAN, "fr": FRENCH, "es": SPANISH, "zh": CHINESE}
