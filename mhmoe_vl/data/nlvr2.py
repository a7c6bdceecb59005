"""NLVR2's files as they are downloaded: JSON lines of sentences with labels, about pairs of pictures.

Those of NLVR (version 1) too, whose sentences are about one drawn picture.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .annotated import SOME_TEXT, Example, PictureFolders, Pictures
from .records import BadRecords, Check, Problem, fields, leaf, line_problems, read_json_lines, show

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
READ = {"sentence": SOME_TEXT}
"""What the task needs of an example beside its identifier."""


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
    lines = _read_lines(path, READ)
    pictures, problems = _pictures({number: line["identifier"] for number, line in enumerate(lines, 1)}, folders)
    if problems:
        raise BadRecords(path, problems)
    found = []
    for line in lines:
        record = Statement(line["identifier"], line["sentence"], truth_value(line.get("label")))
        found.append(Example(record.identifier, record, pictures[_stem(record.identifier)], str(path)))
    return found


def _read_lines(path: Path, more: Mapping[str, Check]) -> list[dict[str, Any]]:
    """The examples of a file, each with its identifier and ``more``."""
    lines = read_json_lines(path)
    if problems := find_problems(dict(enumerate(lines, 1)), more):
        raise BadRecords(path, problems)
    return lines


def find_problems(lines: Mapping[int, Any], more: Mapping[str, Check] = READ) -> list[Problem]:
    """What is wrong with examples by the numbers of their lines; each should have an identifier and ``more``."""
    found = line_problems(lines, fields({"identifier": IDENTIFIER, **more}, {"label": LABEL}), unique="identifier")
    named = _identifiers(lines)
    paired = {number: _PAIR.fullmatch(identifier) is not None for number, identifier in named.items()}
    if len(set(paired.values())) > 1:
        first = next(iter(paired))
        other = next(number for number in paired if paired[number] != paired[first])
        what = f"{show(named[other])} beside {show(named[first])}: keep NLVR and NLVR2 in files of their own"
        found.append((f"line {other}: identifier", what))
    bare = [number for number in named if "label" not in lines[number]]
    if 0 < len(bare) < len(named):
        what = f"{len(bare)} of {len(named)} examples without label: label all of them, or none"
        found.append((f"line {bare[0]}", what))
    return found


def statement_pictures(lines: Mapping[int, Any], folders: PictureFolders) -> Pictures:
    """Place and file of every picture of the examples in these lines, and pairs that are one file or exchanged."""
    named = _identifiers(lines)
    pictures, problems = _pictures(named, folders)
    found = [(f"line {number}", path) for number, name in named.items() for path in pictures[_stem(name)]]
    return found, problems


def _identifiers(lines: Mapping[int, Any]) -> dict[int, str]:
    """The identifiers of the lines that have one."""
    has_one = fields({"identifier": IDENTIFIER})
    return {number: line["identifier"] for number, line in lines.items() if not has_one(line)}


def _stem(identifier: str) -> str:
    """What the names of an example's pictures have in common."""
    pair = _PAIR.fullmatch(identifier)
    return pair[1] if pair else identifier


def _pictures(
    identifiers: Mapping[int, str], folders: PictureFolders
) -> tuple[dict[str, tuple[Path, ...]], list[Problem]]:
    """The pictures by stem, each pair looked at once, and what is wrong with pairs."""
    found: dict[str, tuple[Path, ...]] = {}
    problems: list[Problem] = []
    for number, identifier in identifiers.items():
        stem = _stem(identifier)
        if stem in found:
            continue
        if stem == identifier:
            found[stem] = (folders.find_ending(f"{stem}-0.png"),)
        else:
            left, right = found[stem] = folders.find(f"{stem}-img0.png"), folders.find(f"{stem}-img1.png")
            problems += [(f"line {number}", what) for what in _pair_problems(left, right)]
    return found, problems


def _pair_problems(left: Path, right: Path) -> list[str]:
    """What links in a folder can do to a pair."""
    if not (os.path.isfile(left) and os.path.isfile(right)):
        return []
    if left.samefile(right):
        return [f"the pictures {left.name} and {right.name} are one file"]
    exchanged = left.is_symlink() and left.resolve().name == right.name
    return [f"the picture {left.name} is a link to {right.name}"] if exchanged else []
