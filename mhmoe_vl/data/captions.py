"""Pictures with captions, in the three forms they are downloaded in.

COCO's JSON (``images`` and ``annotations``), Karpathy's ``dataset_coco.json`` (``images`` with ``sentences`` and
``split``), and Flickr8k's ``captions.txt`` (CSV with the head line ``image,caption``).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..errors import DataError
from .annotated import SOME_TEXT, Example, PictureFolders
from .records import (
    TEXT,
    WHOLE,
    BadRecords,
    Check,
    Problem,
    check,
    fields,
    items,
    leaf,
    one_of,
    read_json,
    read_text,
    show,
)
from .sample import split_name

FILE_NAME = leaf(
    "a picture's name such as 000000000139.jpg", lambda value: not TEXT(value) and split_name(value) is not None
)
COCO_SPLITS = ("train2014", "val2014", "test2014", "test2015")
HEAD = ["image", "caption"]


class Captioned(NamedTuple):
    """A picture's captions, none to any number, and its split where the file names one (train, val or test)."""

    image_id: int
    captions: tuple[str, ...]
    split: str | None


Pictured = tuple[Captioned, Sequence[str]]
"""Captions, and the names that their picture may have."""


def read_captions(path: Path, folders: PictureFolders) -> list[Example]:
    """The pictures of a file with their captions; ``record`` is a :class:`Captioned`.

    The file is known by its content. A picture is looked for by the name in the file, then by the names that COCO gives
    its id. Karpathy's ``restval`` counts as training; a line of ``captions.txt`` has no id, so its pictures are
    numbered from 0 as they appear.

    Raises:
        DataError: the file has none of the forms, an id is given twice, a caption is empty or of an unknown picture,
            or two ids have one picture.
    """
    found = [Example(str(record.image_id), record, (folders.find(*names),), str(path)) for record, names in _read(path)]
    first: dict[Path, str] = {}
    twice = [e for e in found if first.setdefault(e.pictures[0], e.key) != e.key]
    if twice:
        names = [f"images {first[e.pictures[0]]} and {e.key} have one picture, {e.pictures[0].name}" for e in twice]
        raise BadRecords(path, [("", name) for name in names])
    return found


def read_references(path: Path) -> dict[int, list[str]]:
    """The captions of every image by its id, from COCO's JSON; all empty for a split without ``annotations``.

    Raises:
        DataError: the file is not a COCO captions file, an id is given twice, or a caption is of an unknown image.
    """
    return _coco_captions(path, read_json(path), TEXT)


def _read(path: Path) -> list[Pictured]:
    text = read_text(path)
    if not text.lstrip().startswith(("{", "[")):
        return _flickr8k(path, text)
    value = read_json(path)
    return _karpathy(path, value) if _is_karpathy(value) else _coco(path, value)


# ------------------------------------------------------------------------------------------------ COCO
def _coco(path: Path, value: Any) -> list[Pictured]:
    captions = _coco_captions(path, value, SOME_TEXT)
    found = []
    for image in value["images"]:
        record = Captioned(image["id"], tuple(captions[image["id"]]), None)
        found.append((record, _names(image.get("file_name"), image["id"])))
    return found


def _coco_captions(path: Path, value: Any, caption: Check) -> dict[int, list[str]]:
    annotations = items(fields({"id": WHOLE, "image_id": WHOLE, "caption": caption}), unique="id")
    images = items(fields({"id": WHOLE}, {"file_name": FILE_NAME}), unique="id")
    check(path, value, fields({"images": images}, {"annotations": annotations}))
    found: dict[int, list[str]] = {image["id"]: [] for image in value["images"]}
    _require_images(path, found)
    unknown = []
    for number, annotation in enumerate(value.get("annotations", [])):
        if annotation["image_id"] in found:
            found[annotation["image_id"]].append(annotation["caption"])
        else:
            unknown.append((f"annotations[{number}].image_id", f"{annotation['image_id']} is not in images"))
    if unknown:
        raise BadRecords(path, unknown)
    return found


def _names(file_name: str | None, coco_id: int | None) -> list[str]:
    """The name in the file without its folder, and COCO's names for the id."""
    given = [] if file_name is None else [PurePosixPath(file_name).name]
    if coco_id is None:
        return given
    number = f"{coco_id:012d}.jpg"
    return [*given, number, *(f"COCO_{split}_{number}" for split in COCO_SPLITS)]


# -------------------------------------------------------------------------------------------- Karpathy
def _is_karpathy(value: Any) -> bool:
    images = value.get("images") if isinstance(value, dict) else None
    return isinstance(images, list) and any(isinstance(image, dict) and "sentences" in image for image in images)


def _karpathy(path: Path, value: Any) -> list[Pictured]:
    identity = "cocoid" if any("cocoid" in image for image in value["images"] if isinstance(image, dict)) else "imgid"
    image = {
        identity: WHOLE,
        "filename": FILE_NAME,
        "split": one_of("train", "restval", "val", "test"),
        "sentences": items(fields({"raw": SOME_TEXT})),
    }
    check(path, value, fields({"images": items(fields(image), unique=identity)}))
    found = []
    for entry in value["images"]:
        captions = tuple(sentence["raw"] for sentence in entry["sentences"])
        record = Captioned(entry[identity], captions, entry["split"].replace("restval", "train"))
        found.append((record, _names(entry["filename"], entry.get("cocoid"))))
    return found


# -------------------------------------------------------------------------------------------- Flickr8k
def _flickr8k(path: Path, text: str) -> list[Pictured]:
    captions: dict[str, list[str]] = {}
    problems: list[Problem] = []
    for line, row in _rows(path, text):
        wrong = _row_problems(row)
        problems += [(f"line {line}", what) for what in wrong]
        if not wrong:
            captions.setdefault(row[0].strip(), []).append(row[1])
    if problems:
        raise BadRecords(path, problems)
    _require_images(path, captions)
    return [(Captioned(i, tuple(texts), None), [name]) for i, (name, texts) in enumerate(captions.items())]


def _rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The rows below the head, each with the number of its first line; blank ones are passed over."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    above = 0
    try:
        for row in reader:
            if above == 0 and [name.strip() for name in row] != HEAD:
                what = f"need {','.join(HEAD)}, got {show(','.join(row))}"
                raise DataError(f"{path}: line 1: {what} (name COCO's or Karpathy's JSON, or a captions.txt)")
            if above and row:
                yield above + 1, row
            above = reader.line_num
    except csv.Error as error:
        raise DataError(f"{path}: line {above + 1}: {error} (mend the quotes)") from error


def _row_problems(row: list[str]) -> list[str]:
    if len(row) != len(HEAD):
        return [f"need image,caption, got {len(row)} values: put a caption with commas in quotes"]
    image, caption = row
    return [f"image: {what}" for _, what in FILE_NAME(image.strip())] + [
        f"caption: {what}" for _, what in SOME_TEXT(caption)
    ]


def _require_images(path: Path, images: Collection[Any]) -> None:
    if not images:
        raise DataError(f"{path}: images: none (name the captions of a whole split)")
