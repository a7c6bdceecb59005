"""COCO's masks, by pycocotools; run lengths are checked first, for it reads and writes past its memory on bad ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask

MAX_GROUPS = 7
"""Characters that one number takes at most: 7 groups of 5 bits."""


def rle_problem(rle: Mapping[str, Any]) -> str:
    """What is wrong with ``{"size": [height, width], "counts": runs}``; empty when nothing is.

    ``counts`` is a list of lengths or their compressed text; together they must fill the picture, column by column,
    background first.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and 0 < side < 2**20 for side in size)):
        return "size: need height and width"
    if isinstance(counts, str):
        runs = decode_counts(counts)
    elif isinstance(counts, list) and all(type(run) is int and 0 <= run < 2**32 for run in counts):
        runs = np.array(counts, np.int64)
    else:
        return "counts: need run lengths or their text"
    if runs is None or (runs < 0).any() or (runs >= 2**32).any():  # sums of longer ones would wrap
        return "counts: not a text of run lengths"
    if runs.sum() != size[0] * size[1]:
        return f"counts: runs of {runs.sum()} pixels for a mask of {size[0]} x {size[1]}"
    return ""


def decode_counts(text: str) -> np.ndarray | None:
    """The run lengths in a compressed text; none when it is no such text.

    A number is written in groups of 5 bits, the lowest first, as characters from code 48 on; bit 6 says that another
    group follows, and the highest bit of the last group is the sign. From the fourth number on, the difference to the
    number two places before is written.
    """
    try:
        codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return None
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > MAX_GROUPS:
        return None
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    values = np.add.reduceat((codes & 31) << shifts, starts)
    values -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def decode(segmentation: Sequence[Sequence[float]] | Mapping[str, Any], height: int, width: int) -> np.ndarray:
    """The uint8 mask ``(height, width)`` of polygons or of a run-length mask, both checked."""
    if not isinstance(segmentation, Mapping):
        polygons = [list(polygon) for polygon in segmentation]
        merged = mask.merge(mask.frPyObjects(polygons, height, width))
        segmentation = merged | {"counts": merged["counts"].decode("ascii")}
    counts = segmentation["counts"]
    runs = decode_counts(counts) if isinstance(counts, str) else np.array(counts)
    return np.repeat(np.arange(len(runs)) % 2, runs).astype(np.uint8).reshape(width, height).T


def encode(pixels: np.ndarray) -> dict[str, Any]:
    """The run-length mask, in JSON values, of a mask ``(height, width)``."""
    rle = mask.encode(np.asfortranarray(pixels, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
