"""Words of pieces, colours of patches, lists of words."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch

from mhmoe_vl.analysis.labels import COLOURS, normal_word, patch_colours, read_words, token_words
from mhmoe_vl.data.text import BPETokenizer
from mhmoe_vl.errors import DataError


def colour_of(*rgb: int) -> str:
    image = torch.tensor(rgb, dtype=torch.uint8)[:, None, None].expand(3, 4, 4)
    return COLOURS[patch_colours(image, 4)[0]]


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((0, 0, 0), "black"),
        ((63, 63, 63), "black"),
        ((64, 64, 64), "grey"),
        ((191, 180, 170), "grey"),
        ((192, 192, 192), "white"),
        ((255, 216, 255), "white"),  # a chroma of 39
        ((255, 215, 255), "magenta"),
        ((255, 0, 0), "red"),
        ((255, 255, 0), "yellow"),
        ((0, 200, 0), "green"),
        ((0, 255, 255), "cyan"),
        ((20, 40, 220), "blue"),
        ((255, 0, 130), "magenta"),
        ((255, 0, 120), "red"),
    ],
)
def test_colours_by_hand(rgb, name):
    assert colour_of(*rgb) == name


def test_hues_are_those_of_the_standard_library():
    """The nearest of six hues, away from the borders between two."""
    rng = np.random.default_rng(0)
    seen = 0
    for rgb in rng.integers(0, 256, (400, 3)).tolist():
        hue = colorsys.rgb_to_hsv(*rgb)[0] * 6
        if max(rgb) - min(rgb) >= 40 and abs(hue % 1 - 0.5) > 0.02:
            seen += 1
            assert colour_of(*rgb) == COLOURS[3 + round(hue) % 6], rgb
    assert seen > 200


def test_patches_in_rows_by_their_means():
    """2 x 3 patches of 2 pixels: the mean decides, not a single pixel."""
    image = torch.zeros(3, 4, 6, dtype=torch.uint8)
    image[0, :2, :2] = 255
    image[1, :2, 2:4] = 255
    image[:, :2, 4:] = 255
    image[2, 2:, :2] = 255
    image[0, 2, 2] = 255  # one of four pixels: mean 63, so a chroma of 63
    assert [COLOURS[i] for i in patch_colours(image, 2)] == ["red", "green", "white", "blue", "red", "black"]


def test_words_of_pieces():
    tokenizer = BPETokenizer()
    ids = tokenizer.encode("A skateboardified Dog, isn't it?")
    words = token_words(tokenizer, ids)
    assert len(words) == len(ids) and words[0] == words[-1] == ""
    assert list(dict.fromkeys(words[1:-1])) == ["a", "skateboardified", "dog", ",", "isn", "t", "it", "?"]
    pieces = tokenizer.pieces(ids)
    long = [p for p, w in zip(pieces, words, strict=True) if w == "skateboardified"]
    assert len(long) > 1 and "".join(long) == "skateboardified "  # every piece of a word knows the word


def test_words_in_letters_of_several_bytes_and_cut_texts():
    tokenizer = BPETokenizer()
    ids = tokenizer.encode("étoile 星星 \U0001f600")
    assert set(token_words(tokenizer, ids)) == {"", "étoile", "星星", "\U0001f600"}
    cut = tokenizer.encode("a skateboardified dog", 4)  # ends inside the word
    assert token_words(tokenizer, cut)[-1] == "" and token_words(tokenizer, cut)[1] == "a"
    assert token_words(tokenizer, []) == []


class SpaceFirst:
    """Pieces as SentencePiece's: the first of a word begins with a space."""

    special_ids = frozenset((0, 2))
    names = ("<s>", " <mask>", "</s>", " a", " sk", "ate", " Dog.", " .")

    def pieces(self, ids):
        return [self.names[i] for i in ids]

    def decode(self, ids):
        return "".join(self.pieces(ids)).strip()


def test_words_whose_pieces_begin_with_a_space():
    assert token_words(SpaceFirst(), [0, 3, 4, 5, 6, 7, 2]) == ["", "a", "skate", "skate", "dog", ".", ""]
    assert token_words(SpaceFirst(), [4, 5]) == ["skate", "skate"]


def test_normal_words():
    words = {" Bank.": "bank", "(Gift)": "gift", "...": "...", "l'eau": "l'eau", "--": "--"}
    assert [normal_word(word) for word in words] == list(words.values())


def test_lists_of_words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("﻿Bank\n\n gift \nbank\nÄrger\n" + "x" * 99, encoding="utf-8")
    assert read_words(path) == ["bank", "gift", "ärger", "x" * 60]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"bank\nriver bank\n", r"words\.txt:2: 'river bank' is more than one word"),
        (b"\n \n", r"words\.txt: 0 words"),
        (b"bank\n\xff\xfe\n", r"words\.txt: not UTF-8 at byte 5"),
        ("\n".join(f"w{i}" for i in range(10_001)).encode(), r"words\.txt: 10001 words"),
    ],
)
def test_lists_that_are_none(tmp_path, content, message):
    (tmp_path / "words.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_words(tmp_path / "words.txt")


def test_a_list_that_is_missing(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_words(tmp_path / "words.txt")
