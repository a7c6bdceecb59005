"""Pack a folder of class folders with pictures (ImageFolder) into image shards.

Each picture is one sample: the picture as it is, cls with the index of its class (folders sorted by name), json with
"class" (the folder's name) and "image". OUT/classes.json lists the classes in the order of their indices.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from packing import add_picture_options, find_bad_pictures, make_parser, pack_split, picture_member, run, settle

from mhmoe_vl.data.manifest import write_text
from mhmoe_vl.data.writing import Members
from mhmoe_vl.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def list_pictures(root: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names, and (path below ``root``, class index) of every picture, both sorted.

    Raises:
        DataError: there are no class folders or no pictures in them.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder (name the folder of the class folders)")
    classes = sorted(folder.name for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    pictures = [
        (path.relative_to(root).as_posix(), index)
        for index, name in enumerate(classes)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    ]
    if not pictures:
        raise DataError(f"{root}: {len(classes)} class folders and no pictures in them (expected ROOT/CLASS/*.jpg)")
    return classes, pictures


def picture_members(root: Path, classes: list[str], picture: tuple[str, int]) -> Members:
    """The picture, its class index as text, and class and file name as JSON."""
    name, index = picture
    extension, data = picture_member(root / name)
    return {extension: data, "cls": str(index), "json": {"class": classes[index], "image": name}}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; raises DataError on bad input."""
    parser = make_parser(__doc__, val_fraction=0.0)
    add_picture_options(parser, "folder that holds one folder per class")
    args = parser.parse_args(argv)
    classes, pictures = list_pictures(args.images)
    bad = find_bad_pictures(args.images, [name for name, _ in pictures], args.processes)
    settle(list(bad.values()), args.skip_bad)
    good = [picture for picture in pictures if picture[0] not in bad]
    pack_split(args, good, partial(picture_members, args.images, classes), {"source": "imagefolder"})
    write_text(args.out / "classes.json", json.dumps(classes, indent=0, ensure_ascii=False))


if __name__ == "__main__":
    run(main)
