"""Pictures with captions, in the three forms they are downloaded in.

COCO's JSON (``images`` and ``annotations``), Karpathy's ``dataset_coco.json`` (``images`` with ``sentences`` and
``split``), and Flickr8k's ``captions.txt`` (CSV with the head line ``image,caption``).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..errors import DataError
from .annotated import SOME_TEXT, Example, PictureFolders, Pictures
from .records import (
    ANYTHING,
    TEXT,
    WHOLE,
    BadRecords,
    Check,
    Problem,
    check,
    every,
    fields,
    items,
    leaf,
    one_of,
    read_json,
    read_text,
    show,
    sound,
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
    if problems := shared_pictures([(f"image {example.key}", example.pictures[0]) for example in found]):
        raise BadRecords(path, problems)
    return found


def shared_pictures(pictures: Iterable[tuple[str, Path]]) -> list[Problem]:
    """The images, by their place, that have the picture of an earlier one."""
    first: dict[Path, str] = {}
    found = [(place, path) for place, path in pictures if first.setdefault(path, place) != place]
    return [(place, f"has the picture of {first[path]}, {path.name}") for place, path in found]


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
    return _karpathy(path, value) if is_karpathy(value) else _coco(path, value)


# ------------------------------------------------------------------------------------------------ COCO
IMAGE = fields({"id": WHOLE}, {"file_name": FILE_NAME})


def coco_file(caption: Check = SOME_TEXT) -> Check:
    """Images, and captions that are about them; splits without captions leave ``annotations`` out."""
    annotations = items(fields({"id": WHOLE, "image_id": WHOLE, "caption": caption}), unique="id")
    images = items(IMAGE, unique="id", least=1)
    return every(fields({"images": images}, {"annotations": annotations}), _unknown_images)


def _unknown_images(value: Any) -> list[Problem]:
    known = {image["id"] for _, image in sound(value, "images", fields({"id": WHOLE}))}
    about = [(place, a["image_id"]) for place, a in sound(value, "annotations", fields({"image_id": WHOLE}))]
    return [(f"{place}.image_id", f"{image} is not in images") for place, image in about if image not in known]


def coco_pictures(value: Any, folders: PictureFolders) -> Pictures:
    """Place and picture of every image, but of those with a wrong id or name."""
    images = sound(value, "images", IMAGE)
    found = [(place, folders.find(*_names(image.get("file_name"), image["id"]))) for place, image in images]
    return found, shared_pictures(found)


def _coco(path: Path, value: Any) -> list[Pictured]:
    captions = _coco_captions(path, value, SOME_TEXT)
    found = []
    for image in value["images"]:
        record = Captioned(image["id"], tuple(captions[image["id"]]), None)
        found.append((record, _names(image.get("file_name"), image["id"])))
    return found


def _coco_captions(path: Path, value: Any, caption: Check) -> dict[int, list[str]]:
    check(path, value, coco_file(caption))
    found: dict[int, list[str]] = {image["id"]: [] for image in value["images"]}
    for annotation in value.get("annotations", []):
        found[annotation["image_id"]].append(annotation["caption"])
    return found


def _names(file_name: str | None, coco_id: int | None) -> list[str]:
    """The name in the file without its folder, and COCO's names for the id."""
    given = [] if file_name is None else [PurePosixPath(file_name).name]
    if coco_id is None:
        return given
    number = f"{coco_id:012d}.jpg"
    return [*given, number, *(f"COCO_{split}_{number}" for split in COCO_SPLITS)]


# -------------------------------------------------------------------------------------------- Karpathy
def is_karpathy(value: Any) -> bool:
    """Whether any image has sentences of its own."""
    return any(True for _ in sound(value, "images", fields({"sentences": ANYTHING})))


def karpathy_file(value: Any) -> Sequence[Problem]:
    """What is wrong with a file of images with their sentences."""
    identity = _identity(value)
    image = {
        identity: WHOLE,
        "filename": FILE_NAME,
        "split": one_of("train", "restval", "val", "test"),
        "sentences": items(fields({"raw": SOME_TEXT})),
    }
    return fields({"images": items(fields(image), unique=identity, least=1)})(value)


def karpathy_pictures(value: Any, folders: PictureFolders) -> Pictures:
    """Place and picture of every image, but of those with a wrong name or COCO id."""
    images = sound(value, "images", fields({"filename": FILE_NAME}, {"cocoid": WHOLE}))
    found = [(place, folders.find(*_names(image["filename"], image.get("cocoid")))) for place, image in images]
    return found, shared_pictures(found)


def _identity(value: Any) -> str:
    """The key of an image's id: those of Flickr8k and Flickr30k have none of COCO's."""
    return "cocoid" if any(True for _ in sound(value, "images", fields({"cocoid": ANYTHING}))) else "imgid"


def _karpathy(path: Path, value: Any) -> list[Pictured]:
    check(path, value, karpathy_file)
    identity, found = _identity(value), []
    for entry in value["images"]:
        captions = tuple(sentence["raw"] for sentence in entry["sentences"])
        record = Captioned(entry[identity], captions, entry["split"].replace("restval", "train"))
        found.append((record, _names(entry["filename"], entry.get("cocoid"))))
    return found


# -------------------------------------------------------------------------------------------- Flickr8k
def _flickr8k(path: Path, text: str) -> list[Pictured]:
    rows = dict(read_rows(path, text))
    if problems := flickr8k_problems(rows):
        raise BadRecords(path, problems)
    captions: dict[str, list[str]] = {}
    for image, caption in rows.values():
        captions.setdefault(image.strip(), []).append(caption)
    return [(Captioned(i, tuple(texts), None), [name]) for i, (name, texts) in enumerate(captions.items())]


def flickr8k_problems(rows: Mapping[int, list[str]]) -> list[Problem]:
    """What is wrong with rows by the numbers of their lines."""
    if not rows:
        return [("", "need at least 1 caption, got none")]
    return [(f"line {line}", what) for line, row in rows.items() for what in _row_problems(row)]


def flickr8k_pictures(rows: Mapping[int, list[str]], folders: PictureFolders) -> Pictures:
    """Line and picture of every row that is as it should be."""
    return [(f"line {line}", folders.find(row[0].strip())) for line, row in rows.items() if not _row_problems(row)], []


def read_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The rows below the head, each with the number of its first line; blank ones are passed over.

    Raises:
        DataError: the head is another one, or quotes do not close.
    """
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
