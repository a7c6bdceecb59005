"""Annotation files by kind: how each official format is known by its content, what can be wrong in it, its pictures.

The tasks refuse a file at the first kind of mistake; with this table everything that is wrong can be listed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from . import captions, nlvr2, vqa
from .annotated import PictureFolders, Pictures
from .records import ANYTHING, Problem, fields, parse_json, read_text, sound, split_lines

_PLACED = re.compile(r"(line \d+(?:, byte \d+)?): ")
_LINE_OF_NLVR = re.compile(r'^\{.*"identifier"\s*:', re.MULTILINE)


class Kind(NamedTuple):
    """A format of annotation files.

    Attributes:
        about: what such a file holds, in a few words.
        syntax: among :data:`SYNTAXES`.
        fits: whether content of this syntax is of this kind; asked in the order of :data:`KINDS`.
        problems: all that is wrong with the content, pictures aside.
        count: entries in it.
        pictures: those of the entries that name one; none where such a file names no pictures.
        links: what its entries are about, by their ids; none where no other file tells of the same ids.
        partner: kind of the file that must tell the same of them.
    """

    about: str
    syntax: str
    fits: Callable[[Any], bool]
    problems: Callable[[Any], Sequence[Problem]]
    count: Callable[[Any], int]
    pictures: Callable[[Any, PictureFolders], Pictures] | None = None
    links: Callable[[Any], dict[int, int]] | None = None
    partner: str = ""


class Parsed(NamedTuple):
    """What could be read of a file.

    Attributes:
        content: a JSON value, or values by line; none where nothing could be read.
        problems: where the syntax is broken.
    """

    content: Any
    problems: list[Problem]


# --------------------------------------------------------------------------------------------- syntaxes
def _parse_whole(path: Path, text: str) -> Parsed:
    try:
        return Parsed(parse_json(text, path), [])
    except DataError as error:
        return Parsed(None, [as_problem(path, error)])


def _parse_lines(path: Path, text: str) -> Parsed:
    content, problems = {}, []
    for number, line in split_lines(text).items():
        try:
            content[number] = parse_json(line, path, number)
        except DataError as error:
            problems.append(as_problem(path, error))
    return Parsed(content, problems)


def _parse_rows(path: Path, text: str) -> Parsed:
    content: dict[int, list[str]] = {}
    try:
        for line, row in captions.read_rows(path, text):
            content[line] = row
    except DataError as error:
        return Parsed(content or None, [as_problem(path, error)])
    return Parsed(content, [])


SYNTAXES: dict[str, Callable[[Path, str], Parsed]] = {
    "JSON": _parse_whole,
    "JSON lines": _parse_lines,
    "CSV": _parse_rows,
}


def _syntax(text: str) -> str:
    """Of the files known here only NLVR's have an identifier in an object of one line."""
    if not text.lstrip().startswith(("{", "[")):
        return "CSV"
    return "JSON lines" if _LINE_OF_NLVR.search(text[:65536]) else "JSON"


def as_problem(path: Path, error: DataError) -> Problem:
    """Where in the file the error is, and what it says without the file's name."""
    what = str(error).removeprefix(f"{path}: ")
    placed = _PLACED.match(what)
    return (placed[1], what[placed.end() :]) if placed else ("", what)


# ------------------------------------------------------------------------------------------------ kinds
def _has(key: str, without: str = "") -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and key in value and without not in value


def _captions(value: Any) -> bool:
    """COCO's instances have boxes where its captions have texts."""
    return _has("images")(value) and not any(sound(value, "annotations", fields({"bbox": ANYTHING})))


def _any(value: Any) -> bool:
    return True


def _entries(key: str) -> Callable[[Any], int]:
    return lambda value: sum(1 for _ in sound(value, key, ANYTHING))


KINDS: dict[str, Kind] = {
    "vqa-questions": Kind(
        "VQA v2 questions", "JSON", _has("questions"), vqa.questions_file(), _entries("questions"),
        vqa.question_pictures, partial(vqa.image_ids, key="questions"),
    ),
    "karpathy": Kind(
        "captions in Karpathy's form", "JSON", captions.is_karpathy, captions.karpathy_file, _entries("images"),
        captions.karpathy_pictures,
    ),
    "coco-captions": Kind(
        "captions in COCO's form", "JSON", _captions, captions.coco_file(), _entries("images"),
        captions.coco_pictures,
    ),
    "vqa-annotations": Kind(
        "VQA v2 annotations", "JSON", _has("annotations", "images"), vqa.annotations_file(), _entries("annotations"),
        None, partial(vqa.image_ids, key="annotations"), "vqa-questions",
    ),
    "nlvr": Kind(
        "NLVR2 or NLVR statements", "JSON lines", _any, nlvr2.find_problems, len, nlvr2.statement_pictures,
    ),
    "flickr8k": Kind(
        "captions in Flickr8k's form", "CSV", _any, captions.flickr8k_problems, len, captions.flickr8k_pictures,
    ),
}  # fmt: skip
"""By the name that ``--kind`` takes; of two that may fit, the more special one first."""


def parse(path: Path, kind: str | None = None) -> tuple[str | None, Parsed]:
    """The kind of a file, by its content where none is given, and what could be read of it; no kind where none fits."""
    try:
        text = read_text(path)
    except DataError as error:
        return kind, Parsed(None, [as_problem(path, error)])
    syntax = KINDS[kind].syntax if kind else _syntax(text)
    parsed = SYNTAXES[syntax](path, text)
    if kind is None and parsed.content is not None:
        fitting = (name for name, of in KINDS.items() if of.syntax == syntax and of.fits(parsed.content))
        kind = next(fitting, None)
    return kind, parsed


def unmatched(own: Mapping[int, int], others: Mapping[int, int], of: str) -> list[Problem]:
    """The ids of which a file and its partner (named ``of``) do not tell the same."""
    found = [(f"id {i}", f"is not in {of}") for i in own if i not in others]
    found += [(f"id {i}", f"is in {of}, not here") for i in others if i not in own]
    differ = [i for i in own if i in others and own[i] != others[i]]
    return found + [(f"id {i}", f"is about {own[i]} here, about {others[i]} in {of}") for i in differ]
