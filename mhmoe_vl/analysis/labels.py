"""What is known of tokens beside their routing: the word a piece belongs to, the colour of a patch, the class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ..data.text import TextTokenizer
from ..errors import DataError, one_line
from .token_sample import LABEL

COLOURS = ("black", "grey", "white", "red", "yellow", "green", "cyan", "blue", "magenta")
MIN_CHROMA, BLACK_BELOW, WHITE_FROM = 40, 64, 192
MAX_WORDS = 10_000
PUNCTUATION = " \t.,;:!?\"'()[]{}<>*_-"


@dataclass(frozen=True)
class Labels:
    """Of the samples of one trace: I images, T texts. Texts are of at most 60 characters.

    Attributes:
        image_samples, text_samples: (I,) and (T,) int64, numbers of the samples in the data set.
        image_classes, text_classes: (I,) and (T,) text; empty where a sample has no class.
        colours: (I, P) text, one of :data:`COLOURS` per patch.
        words: (T, N) text, the word that each token is part of, lower-case; empty for begin, end and padding.
    """

    image_samples: np.ndarray
    text_samples: np.ndarray
    image_classes: np.ndarray
    text_classes: np.ndarray
    colours: np.ndarray
    words: np.ndarray


def patch_colours(image: Tensor, patch_size: int) -> np.ndarray:
    """(P,) int8, index into :data:`COLOURS` of the mean colour of every patch.

    With v the largest and c the largest minus the smallest of the mean red, green and blue (0 to 255): below c = 40
    black (v < 64), white (v >= 192) or grey between; else the nearest of the six hues that lie 60 degrees apart. All in
    whole numbers.

    Args:
        image: (3, H, W) uint8.
        patch_size: side of a patch, which divides H and W.
    """
    rows, columns = (side // patch_size for side in image.shape[1:])
    pixels = image.numpy().astype(np.int64).reshape(3, rows, patch_size, columns, patch_size)
    rgb = pixels.sum((2, 4)).reshape(3, -1) // patch_size**2
    value, chroma = rgb.max(0), rgb.max(0) - rgb.min(0)
    return np.where(chroma < MIN_CHROMA, _greys(value), 3 + _hues(rgb, chroma)).astype(np.int8)


def _greys(value: np.ndarray) -> np.ndarray:
    return (value >= BLACK_BELOW).astype(np.int64) + (value >= WHITE_FROM)


def _hues(rgb: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """0 to 5: red, yellow, green, cyan, blue, magenta. Sixths of the circle, in units of ``chroma`` from red."""
    red, green, blue = rgb
    largest = rgb.argmax(0)
    turn = np.choose(largest, (green - blue, 2 * chroma + blue - red, 4 * chroma + red - green))
    return (2 * turn + chroma) // np.maximum(2 * chroma, 1) % 6


def token_words(tokenizer: TextTokenizer, ids: Sequence[int]) -> list[str]:
    """For every id the word that it is part of, lower-case and without punctuation at its ends (which stays where it
    is all there is); empty for special ids."""
    words, start = [""] * len(ids), 0
    pieces = tokenizer.pieces(ids)
    for place in range(len(ids)):
        last = place + 1 == len(ids)
        ends = last or pieces[place].endswith(" ") or pieces[place + 1].startswith(" ")
        if ids[place] in tokenizer.special_ids:
            start = place + 1
        elif ends or ids[place + 1] in tokenizer.special_ids:
            word = normal_word(tokenizer.decode(ids[start : place + 1]))
            words[start : place + 1] = [word] * (place + 1 - start)
            start = place + 1
    return words


def normal_word(word: str) -> str:
    """How words are compared: lower-case, punctuation at the ends left out unless there is nothing else."""
    word = word.strip().lower()
    return word.strip(PUNCTUATION) or word


def read_words(path: Path) -> list[str]:
    """A list of words, one a line, in its order without repetitions.

    Raises:
        DataError: not readable as UTF-8, two words on a line, no word, or more than 10,000.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
        raise DataError(f"{path}: {what} (name a text file with a word a line)") from error
    for number, line in enumerate(lines, 1):
        if len(line.split()) > 1:
            raise DataError(f"{path}:{number}: {one_line(line, 60)!r} is more than one word (write a word a line)")
    words = list(dict.fromkeys(str(np.array(normal_word(line), LABEL)) for line in lines if line.strip()))
    if not 1 <= len(words) <= MAX_WORDS:
        raise DataError(f"{path}: {len(words)} words (list 1 to {MAX_WORDS})")
    return words
