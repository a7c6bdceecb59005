"""Good files made bad: one thing in a JSON value, or in a text, deleted, replaced or doubled."""

from __future__ import annotations

import copy
import random
from typing import Any

EXTREMES = [None, True, -1, 2**70, 1e308, "", "\ud800", "\x1b[31m", "x" * 3000, [], {}, [[[]]], {"answer": None}]


def mutate(value: Any, rng: random.Random) -> Any:
    """A copy with one thing in it deleted, replaced, or doubled."""
    value = copy.deepcopy(value)
    holder = value
    while True:
        places = list(holder) if isinstance(holder, dict) else range(len(holder))
        place = rng.choice(list(places))
        if not (isinstance(holder[place], (dict, list)) and holder[place] and rng.random() < 0.8):
            break
        holder = holder[place]
    kind = rng.choice(["delete", "replace", "double"])
    if kind == "double" and isinstance(holder, list):
        holder.append(holder[place])
    elif kind == "delete":
        del holder[place]
    else:
        holder[place] = rng.choice(EXTREMES)
    return value


PIECES = ["", '"', ",", "\n", "\r", "\0", "\ufeff", "[", "}", "1e999", "NaN", "\x1b[31m", "é", "x" * 3000]


def mutate_text(text: str, rng: random.Random) -> str:
    """``text`` with a stretch of it cut out, doubled, or replaced."""
    start, stop = sorted(rng.randint(0, len(text)) for _ in range(2))
    if rng.random() < 0.7:
        stop = min(stop, start + 3)
    return text[:start] + rng.choice([*PIECES, text[start:stop] * 2]) + text[stop:]
