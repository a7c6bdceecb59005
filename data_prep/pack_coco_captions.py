"""Pack COCO captions (captions_*.json with the folder of its pictures) into image-text shards.

Each picture is one sample: the picture as it is, txt with its first caption, json with "captions" (all of them, in
the order of their annotation ids), "image" (the file's name) and "image_id".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packing import Captioned, add_picture_options, make_parser, pack_captioned, read_json, run

from mhmoe_vl.errors import DataError, one_line

IMAGE_KEYS = {"id": int, "file_name": str}
CAPTION_KEYS = {"id": int, "image_id": int, "caption": str}


def read_captions(path: Path) -> tuple[list[Captioned], list[str]]:
    """Pictures with their captions, sorted by image id, and one line for each bad caption or picture without one.

    Raises:
        DataError: the file is not a COCO captions file, or an id is given twice.
    """
    data = read_json(path)
    names = {image["id"]: image["file_name"] for image in records(path, data, "images", IMAGE_KEYS)}
    captions: dict[int, list[str]] = {image_id: [] for image_id in names}
    problems = []
    for record in sorted(records(path, data, "annotations", CAPTION_KEYS), key=lambda record: record["id"]):
        image_id, caption = record["image_id"], record["caption"].strip()
        if image_id in captions and caption:
            captions[image_id].append(caption)
        else:
            what = "empty caption" if image_id in captions else f"unknown image_id {image_id}"
            problems.append(f"{path}: annotation with id {record['id']}: {what} (mend the file)")
    problems += [f"{path}: image with id {i}: no caption (mend the file)" for i in sorted(names) if not captions[i]]
    items = [Captioned(names[i], tuple(captions[i]), {"image_id": i}) for i in sorted(names) if captions[i]]
    return items, problems


def records(path: Path, data: Any, section: str, keys: dict[str, type]) -> list[dict[str, Any]]:
    """The list ``data[section]``, every entry with ``keys`` of the right type and an ``id`` of its own."""
    entries = data.get(section) if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise DataError(f"{path}: no list {section!r} (name a COCO captions file)")
    seen: set[int] = set()
    for number, entry in enumerate(entries):
        for key, kind in keys.items():
            value = entry.get(key) if isinstance(entry, dict) else None
            if type(value) is not kind:
                what = f"{one_line(repr(value), 60)}, not {'a whole number' if kind is int else 'a text'}"
                raise DataError(f"{path}:{section}[{number}].{key}: {what} (mend the file)")
        if entry["id"] in seen:
            raise DataError(f"{path}:{section}[{number}].id: {entry['id']} is given twice (mend the file)")
        seen.add(entry["id"])
    return entries


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; raises DataError on bad input."""
    parser = make_parser(__doc__, val_fraction=0.0)
    parser.add_argument("--captions", type=Path, required=True, help="captions_*.json in COCO's format")
    add_picture_options(parser, "folder of the pictures")
    args = parser.parse_args(argv)
    items, problems = read_captions(args.captions)
    pack_captioned(args, items, problems, {"source": "coco_captions"})


if __name__ == "__main__":
    run(main)
