"""NLVR2's files as they are downloaded: JSON lines of sentences with labels, about pairs of pictures.

Those of NLVR (version 1) too, whose sentences are about one drawn picture.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from .annotated import SOME_TEXT, Example, PictureFolders
from .records import BadRecords, Check, Problem, check_lines, fields, leaf, read_json_lines, show

_PAIR = re.compile(r"(\w+-\d+-\d+)-\d+")
_DRAWN = re.compile(r"\d+-\d+")


class Statement(NamedTuple):
    """A sentence about pictures and, where its split has them, whether it is true."""

    identifier: str
    sentence: str
    label: bool | None


def truth_value(label: object) -> bool | None:
    """A label or prediction: a boolean or its name in any case (NLVR2 ``True``, v1 ``true``); none if it is neither."""
    return label if isinstance(label, bool) else {"true": True, "false": False}.get(str(label).lower())


IDENTIFIER = leaf(
    "an identifier such as dev-850-0-1",
    lambda value: isinstance(value, str) and bool(_PAIR.fullmatch(value) or _DRAWN.fullmatch(value)),
)
LABEL = leaf("True or False", lambda value: truth_value(value) is not None)


def read_labels(path: Path) -> dict[str, bool | None]:
    """The label of every example by its identifier, in the order of an official file; none where it has none.

    Raises:
        DataError: the file is not one, an identifier stands twice, or NLVR2 and NLVR are mixed.
    """
    return {line["identifier"]: truth_value(line.get("label")) for line in _read_lines(path, {})}


def read_statements(path: Path, folders: PictureFolders) -> list[Example]:
    """The sentences of a split, each with its pictures; ``record`` is a :class:`Statement`, its label none if all are.

    The pictures of ``dev-850-0-1`` are ``dev-850-0-img0.png`` (left) and ``dev-850-0-img1.png`` (right); that of
    ``1572-0`` is ``<split>-1572-0-0.png``, the first of the orders in which its three boxes were drawn.

    Raises:
        DataError: the file is not an official one, only some examples have labels, or the two pictures of a pair are
            one file or exchanged.
    """
    lines = _read_lines(path, {"sentence": SOME_TEXT})
    bare = [line["identifier"] for line in lines if "label" not in line]
    if 0 < len(bare) < len(lines):
        what = f"{len(bare)} of {len(lines)} examples without label, first {bare[0]}"
        raise DataError(f"{path}: {what} (label all of them, or none)")
    pictures = _pictures(path, [line["identifier"] for line in lines], folders)
    found = []
    for line in lines:
        record = Statement(line["identifier"], line["sentence"], truth_value(line.get("label")))
        found.append(Example(record.identifier, record, pictures[_stem(record.identifier)], str(path)))
    return found


def _read_lines(path: Path, more: Mapping[str, Check]) -> list[dict[str, Any]]:
    """The examples of a file, each with its identifier and ``more``."""
    lines = read_json_lines(path)
    check_lines(path, lines, fields({"identifier": IDENTIFIER, **more}, {"label": LABEL}), unique="identifier")
    paired = [_PAIR.fullmatch(line["identifier"]) is not None for line in lines]
    if len(set(paired)) > 1:
        number = paired.index(not paired[0])
        names = f"{show(lines[number]['identifier'])} beside {show(lines[0]['identifier'])}"
        raise DataError(f"{path}: line {number + 1}: identifier: {names} (keep NLVR and NLVR2 in files of their own)")
    return lines


def _stem(identifier: str) -> str:
    """What the names of an example's pictures have in common."""
    pair = _PAIR.fullmatch(identifier)
    return pair[1] if pair else identifier


def _pictures(path: Path, identifiers: list[str], folders: PictureFolders) -> dict[str, tuple[Path, ...]]:
    """The pictures by stem, each pair looked at once."""
    found: dict[str, tuple[Path, ...]] = {}
    problems: list[Problem] = []
    for number, identifier in enumerate(identifiers, 1):
        stem = _stem(identifier)
        if stem in found:
            continue
        if stem == identifier:
            found[stem] = (folders.find_ending(f"{stem}-0.png"),)
        else:
            left, right = found[stem] = folders.find(f"{stem}-img0.png"), folders.find(f"{stem}-img1.png")
            problems += [(f"line {number}", what) for what in _pair_problems(left, right)]
    if problems:
        raise BadRecords(path, problems)
    return found


def _pair_problems(left: Path, right: Path) -> list[str]:
    """What links in a folder can do to a pair."""
    if not (os.path.isfile(left) and os.path.isfile(right)):
        return []
    if left.samefile(right):
        return [f"the pictures {left.name} and {right.name} are one file"]
    exchanged = left.is_symlink() and left.resolve().name == right.name
    return [f"the picture {left.name} is a link to {right.name}"] if exchanged else []
