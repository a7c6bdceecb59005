from __future__ import annotations

import re

import numpy as np
import pytest
from scene_captions import LANGUAGES, caption
from scene_drawing import BACKGROUNDS, COLORS, RADII, SHAPES, Scene, SceneObject, sample_scene

STAR = SceneObject("star", "green", "large", (30.0, 60.0), 20.0, 0.0)
CROSS = SceneObject("cross", "brown", "small", (90.0, 60.0), 12.0, 0.0)
DIAMOND = SceneObject("diamond", "purple", "small", (90.0, 20.0), 12.0, 0.0)
SQUARE = SceneObject("square", "blue", "large", (92.0, 90.0), 20.0, 0.0)

# Written by hand: list, counted list, and each of the two directions as a phrase and as a sentence.
STAR_AND_CROSS = {
    "en": [
        "a large green star and a small brown cross on a white background",
        "two shapes on a white background: a large green star and a small brown cross",
        "a large green star to the left of a small brown cross on a white background",
        "a small brown cross to the right of a large green star on a white background",
        "the large green star is to the left of the small brown cross",
        "the small brown cross is to the right of the large green star",
    ],
    "de": [
        "ein großer grüner Stern und ein kleines braunes Kreuz auf weißem Hintergrund",
        "zwei Formen auf weißem Hintergrund: ein großer grüner Stern und ein kleines braunes Kreuz",
        "ein großer grüner Stern links von einem kleinen braunen Kreuz auf weißem Hintergrund",
        "ein kleines braunes Kreuz rechts von einem großen grünen Stern auf weißem Hintergrund",
        "der große grüne Stern ist links von dem kleinen braunen Kreuz",
        "das kleine braune Kreuz ist rechts von dem großen grünen Stern",
    ],
    "fr": [
        "une grande étoile verte et une petite croix marron sur fond blanc",
        "deux formes sur fond blanc : une grande étoile verte et une petite croix marron",
        "une grande étoile verte à gauche d'une petite croix marron sur fond blanc",
        "une petite croix marron à droite d'une grande étoile verte sur fond blanc",
        "la grande étoile verte est à gauche de la petite croix marron",
        "la petite croix marron est à droite de la grande étoile verte",
    ],
    "es": [
        "una estrella verde grande y una cruz marrón pequeña sobre fondo blanco",
        "dos figuras sobre fondo blanco: una estrella verde grande y una cruz marrón pequeña",
        "una estrella verde grande a la izquierda de una cruz marrón pequeña sobre fondo blanco",
        "una cruz marrón pequeña a la derecha de una estrella verde grande sobre fondo blanco",
        "la estrella verde grande está a la izquierda de la cruz marrón pequeña",
        "la cruz marrón pequeña está a la derecha de la estrella verde grande",
    ],
    "zh": [
        "白色背景上有一个绿色大星形和一个棕色小十字形",
        "白色背景上有两个图形：一个绿色大星形和一个棕色小十字形",
        "白色背景上，一个绿色大星形在一个棕色小十字形的左边",
        "白色背景上，一个棕色小十字形在一个绿色大星形的右边",
        "绿色大星形在棕色小十字形的左边",
        "棕色小十字形在绿色大星形的右边",
    ],
}
ABOVE = {
    "en": "the small purple diamond is above the large blue square",
    "de": "die kleine violette Raute ist über dem großen blauen Quadrat",
    "fr": "le petit losange violet est au-dessus du grand carré bleu",
    "es": "el rombo morado pequeño está encima del cuadrado azul grande",
    "zh": "紫色小菱形在蓝色大正方形的上方",
}
BELOW = {
    "de": "ein großes blaues Quadrat unter einer kleinen violetten Raute auf grauem Hintergrund",
    "fr": "un grand carré bleu au-dessous d'un petit losange violet sur fond gris",
    "es": "un cuadrado azul grande debajo de un rombo morado pequeño sobre fondo gris",
}


def all_captions(scene: Scene, language: str) -> set[str]:
    return {caption(scene, language, np.random.default_rng(i)) for i in range(150)}


@pytest.mark.parametrize("language", LANGUAGES)
def test_grammar_by_hand(language):
    assert all_captions(Scene(128, "white", "plain", (STAR, CROSS)), language) == set(STAR_AND_CROSS[language])
    upright = all_captions(Scene(128, "grey", "plain", (DIAMOND, SQUARE)), language)
    assert ABOVE[language] in upright and BELOW.get(language, ABOVE[language]) in upright


def test_lists_of_one_and_four():
    one = Scene(128, "pink", "plain", (STAR,))
    assert all_captions(one, "en") == {
        "a large green star on a pink background",
        "one shape on a pink background: a large green star",
    }
    four = all_captions(Scene(128, "pink", "plain", (STAR, CROSS, DIAMOND, SQUARE)), "fr")
    things = "une grande étoile verte, une petite croix marron, un petit losange violet et un grand carré bleu"
    assert f"quatre formes sur fond rose : {things}" in four


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_word_is_in_every_table(language):
    words = LANGUAGES[language]
    assert set(words.nouns) == set(SHAPES) and set(words.adjectives) == {*COLORS, *RADII}
    assert set(words.grounds) == set(BACKGROUNDS)
    genders = {noun.split()[0] for noun in words.nouns.values()}
    assert all(genders <= set(articles) for articles in words.articles.values())
    phrases = {words.name(SceneObject(s, c, z, (0, 0), 1, 0)) for s in SHAPES for c in COLORS for z in RADII}
    assert len(phrases) == len(SHAPES) * len(COLORS) * len(RADII)


OBJECT = r"(?:a|the) (small|large) (\w+) (\w+)"
RELATION = r"(to the left of|to the right of|above|below)"
GROUND = r" on a (\w+) background"


def assert_true(text: str, scene: Scene) -> None:
    """Parse an English caption word by word and compare it with the scene."""
    looks = [(o.size, o.color, o.shape) for o in scene.objects]
    if ground := re.search(GROUND, text):
        assert ground[1] == scene.background
    named = re.findall(OBJECT, re.sub(GROUND, "", text))
    if relation := re.search(RELATION, text):
        first, second = (scene.objects[looks.index(look)].center for look in named)
        dx, dy = second[0] - first[0], second[1] - first[1]
        truth = {"to the left of": dx, "to the right of": -dx, "above": dy, "below": -dy}[relation[1]]
        assert truth > 0 and truth == max(abs(dx), abs(dy))
    else:
        assert named == looks
    if count := re.match(r"(\w+) shapes?", text):
        assert ["one", "two", "three", "four"].index(count[1]) + 1 == len(looks)


def test_english_captions_are_true():
    for i in range(400):
        rng = np.random.default_rng([4, i])
        scene = sample_scene(rng)
        assert_true(caption(scene, "en", rng), scene)


@pytest.mark.parametrize(
    "text",
    [
        "a large green star and a small brown ring on a white background",
        "a large green star and a small brown cross on a grey background",
        "the small brown cross is above the large green star",
        "one shape on a white background: a large green star and a small brown cross",
    ],
)
def test_the_check_of_truth_can_fail(text):
    with pytest.raises((AssertionError, ValueError)):
        assert_true(text, Scene(128, "white", "plain", (STAR, CROSS)))
