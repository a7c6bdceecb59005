"""Pascal VOC's annotations as a COCO instances file, which all else here reads.

VOC/ImageSets/Main/SPLIT.txt names the pictures of a split, VOC/Annotations/NAME.xml says what is in each. For every
split named OUT/SPLIT.json is written; the pictures stay in VOC/JPEGImages. Categories are numbered from 1 in the order
of their names, over all splits named. VOC counts pixels from 1 and includes the last one, so a box of xmin 1, xmax 10
becomes x 0, width 10. Objects marked difficult become crowds, which evaluation neither asks for nor counts as wrong, as
VOC's own does; boxes are clipped to the picture, empty ones left out, and both are counted.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.parsers import expat

from packing import run
from tqdm import tqdm

from mhmoe_vl.data.coco import MAX_SIDE
from mhmoe_vl.data.manifest import write_text
from mhmoe_vl.data.records import read_text
from mhmoe_vl.errors import DataError, OneLineParser, one_line

EDGES = ("xmin", "ymin", "xmax", "ymax")
NAME = re.compile(r"[^/\\\x00-\x1f]{1,200}")


class Box(NamedTuple):
    """An object: its kind, x, y, width, height, and whether VOC calls it difficult."""

    kind: str
    place: tuple[float, float, float, float]
    difficult: bool


class VocPicture(NamedTuple):
    """A picture: file name, sizes, objects, and how many boxes were clipped or left out."""

    file_name: str
    width: int
    height: int
    boxes: list[Box]
    counts: Counter[str]


def read_split(path: Path) -> list[str]:
    """The names in a file of ``ImageSets``, each once; a second column (``1``, ``-1``) is passed over.

    Raises:
        DataError: there is none, one stands twice, or one is no file name.
    """
    lines = {number: line.split()[0] for number, line in enumerate(read_text(path).splitlines(), 1) if line.strip()}
    if not lines:
        raise DataError(f"{path}: no names (name a split of pictures)")
    for number, name in lines.items():
        if not NAME.fullmatch(name) or name.startswith("."):
            raise DataError(f"{path}: line {number}: {one_line(repr(name), 60)} is no file name (mend the file)")
    for name, count in Counter(lines.values()).items():
        if count > 1:
            raise DataError(f"{path}: {name} stands {count} times (keep one line)")
    return list(lines.values())


def read_picture(path: Path) -> VocPicture:
    """What an annotation file says of its picture.

    Raises:
        DataError: it is not one; entities, which could name other files or grow without end, are refused.
    """
    root = _parse(path)
    if root.tag != "annotation":
        raise DataError(f"{path}: <{one_line(root.tag, 40)}>, need <annotation> (name a Pascal VOC file)")
    file_name = _text(path, root, "filename")
    if not NAME.fullmatch(file_name) or file_name.startswith("."):
        raise DataError(f"{path}: filename: {one_line(repr(file_name), 60)} is no file name (mend the file)")
    width, height = (_number(path, root, f"size/{side}") for side in ("width", "height"))
    for name, side in (("width", width), ("height", height)):
        if side != int(side) or not 0 < side <= MAX_SIDE:
            raise DataError(f"{path}: size/{name}: {side:g}, need 1 to {MAX_SIDE} pixels (mend the file)")
    counts: Counter[str] = Counter()
    boxes = [
        box
        for number, entry in enumerate(root.findall("object"))
        if (box := _box(path, entry, f"object[{number}]", (int(width), int(height)), counts))
    ]
    return VocPicture(file_name, int(width), int(height), boxes, counts)


def _parse(path: Path) -> ElementTree.Element:
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate(namespace_separator=None)
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler, parser.buffer_text = builder.data, True

    def refuse(*_: Any) -> None:
        raise DataError(f"{path}: line {parser.CurrentLineNumber}: a document type or entity (remove it)")

    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    try:
        parser.Parse(read_text(path), True)
        return builder.close()
    except expat.ExpatError as error:
        what = expat.errors.messages.get(error.code, "damaged")
        raise DataError(f"{path}: line {error.lineno}: not XML: {what} (mend the file)") from error


def _text(path: Path, entry: ElementTree.Element, place: str, inside: str = "") -> str:
    text = (entry.findtext(place) or "").strip()
    if not text:
        raise DataError(f"{path}: {inside}{place}: missing (mend the file)")
    return text


def _number(path: Path, entry: ElementTree.Element, place: str, inside: str = "") -> float:
    text = _text(path, entry, place, inside)
    if not re.fullmatch(r"[-+]?\d{1,9}(\.\d{1,9})?", text, re.ASCII):
        raise DataError(f"{path}: {inside}{place}: need a number, got {one_line(repr(text), 40)} (mend the file)")
    return float(text)


def _box(
    path: Path, entry: ElementTree.Element, inside: str, size: tuple[int, int], counts: Counter[str]
) -> Box | None:
    kind = _text(path, entry, "name", f"{inside}/")
    left, top, right, bottom = (_number(path, entry, f"bndbox/{edge}", f"{inside}/") for edge in EDGES)
    if right < left or bottom < top:
        what = f"xmin {left:g}, ymin {top:g}, xmax {right:g}, ymax {bottom:g}"
        raise DataError(f"{path}: {inside}/bndbox: {what} (put the smaller number first)")
    inner = (max(left, 1), max(top, 1), min(right, size[0]), min(bottom, size[1]))
    if inner[2] < inner[0] or inner[3] < inner[1]:
        counts["boxes outside of their picture left out"] += 1
        return None
    counts["boxes clipped"] += inner != (left, top, right, bottom)
    place = (inner[0] - 1, inner[1] - 1, inner[2] - inner[0] + 1, inner[3] - inner[1] + 1)
    return Box(kind, place, (entry.findtext("difficult") or "0").strip() == "1")


def to_coco(pictures: Sequence[VocPicture], kinds: Sequence[str]) -> dict[str, Any]:
    """The instances file of a split."""
    numbers = {kind: number for number, kind in enumerate(kinds, 1)}
    images = [
        {"id": number, "file_name": picture.file_name, "width": picture.width, "height": picture.height}
        for number, picture in enumerate(pictures, 1)
    ]
    annotations = list(_annotations(pictures, numbers))
    categories = [{"id": number, "name": kind} for kind, number in numbers.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _annotations(pictures: Sequence[VocPicture], numbers: dict[str, int]) -> Iterator[dict[str, Any]]:
    count = 0
    for image, picture in enumerate(pictures, 1):
        for box in picture.boxes:
            count += 1
            _, _, width, height = box.place
            yield {
                "id": count, "image_id": image, "category_id": numbers[box.kind], "bbox": list(box.place),
                "area": width * height, "iscrowd": int(box.difficult),
            }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; raises DataError on bad input."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--voc", type=Path, required=True, help="folder with Annotations and ImageSets/Main")
    parser.add_argument("--out", type=Path, required=True, help="folder that SPLIT.json is written into")
    parser.add_argument("--splits", nargs="+", default=["train", "val", "test"], help="default: train val test")
    args = parser.parse_args(argv)
    names = {split: read_split(args.voc / "ImageSets" / "Main" / f"{split}.txt") for split in args.splits}
    found = {
        split: [read_picture(args.voc / "Annotations" / f"{name}.xml") for name in tqdm(listed, split, disable=None)]
        for split, listed in names.items()
    }
    kinds = sorted({box.kind for pictures in found.values() for picture in pictures for box in picture.boxes})
    if not kinds:
        raise DataError(f"{args.voc}: no objects in any split (check the folder)")
    for split, pictures in found.items():
        coco, path = to_coco(pictures, kinds), args.out / f"{split}.json"
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(coco) + "\n")
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror} (name another folder)") from error
        odd = sum((picture.counts for picture in pictures), Counter())
        notes = "".join(f", {count} {what}" for what, count in sorted(odd.items()) if count)
        print(f"{path}: {len(coco['images'])} pictures, {len(coco['annotations'])} objects{notes}")


if __name__ == "__main__":
    run(main)
