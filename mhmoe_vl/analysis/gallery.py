"""``gallery.json`` and its pictures: examples with what a model made of them, for the run's report.

The file is a list of cards, the pictures lie beside it::

    [{"images": ["gallery/000-0.jpg"], "caption": "what is in the net?", "right": false,
      "rows": [["answer", "tennis ball"], ["true answer", "fish"]], "bars": [["tennis ball", 0.61], ["fish", 0.22]]}]

``right`` is null where nothing is right or wrong; a bar is a share of 0 to 1, or null where it was not finite. A row
whose name starts with ``true`` marks the bar that is named as its value.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..data import records
from ..data.sample import MAX_MEMBER_BYTES
from ..data.transforms import decode_image
from ..errors import DataError, one_line
from .charts import Table, number, percent

FILE = "gallery.json"
MAX_CARDS, PICTURE_SIDE = 48, 320
_NAME = re.compile(r"gallery/[0-9]{3,}-[0-9]+\.jpg")


class Bar(NamedTuple):
    """One answer with its share of 0 to 1, the share as text, and whether it is the true one."""

    name: str
    share: float
    text: str
    true: bool


class Card(NamedTuple):
    """One example to show; ``pictures`` are data addresses, from left to right."""

    pictures: list[str]
    caption: str
    right: bool | None
    rows: Table
    bars: list[Bar]


# --------------------------------------------------------------------------------------------- writing
def write_gallery(run_dir: str | Path, items: Iterable[Mapping[str, Any]]) -> None:
    """Write ``gallery.json`` into a run folder, and small copies of its pictures into ``gallery/``.

    A card whose pictures cannot all be read is left without any, because a report is written when training is over.
    Pictures of an earlier gallery that are not named any more are removed.

    Args:
        run_dir: the run folder.
        items: cards as in the file (see above), all keys given, but ``images`` are paths of JPEG, PNG or WebP files, or
            the bytes of such files.
    """
    run_dir = Path(run_dir)
    (run_dir / "gallery").mkdir(parents=True, exist_ok=True)
    entries = [_copy(run_dir, place, item) for place, item in enumerate(items)]
    _replace(run_dir / FILE, (json.dumps(entries, indent=1, allow_nan=False) + "\n").encode())
    named = {name for entry in entries for name in entry["images"]}
    for path in (run_dir / "gallery").iterdir():
        name = f"gallery/{path.name}"
        if _NAME.fullmatch(name) and name not in named:
            path.unlink()


def _copy(run_dir: Path, place: int, card: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a card, its pictures written."""
    try:
        pictures = [_small_jpeg(image if isinstance(image, bytes) else Path(image)) for image in card["images"]]
    except DataError:
        pictures = []
    names = [f"gallery/{place:03}-{i}.jpg" for i in range(len(pictures))]
    for name, data in zip(names, pictures, strict=True):
        _replace(run_dir / name, data)
    rows = [[name, _finite(value)] for name, value in card["rows"]]
    # Six digits, because float32 probabilities may end just above 1.
    bars = [[name, round(share, 6) if math.isfinite(share) else None] for name, share in card["bars"]]
    return {"images": names, "caption": card["caption"], "right": card["right"], "rows": rows, "bars": bars}


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)


def _small_jpeg(source: Path | bytes) -> bytes:
    """A picture of at most 320 pixels to a side, written anew, so that nothing else of its file gets into a page."""
    try:
        data = source if isinstance(source, bytes) else _file(source)
        picture = Image.fromarray(decode_image(data).permute(1, 2, 0).numpy())
    except (OSError, DataError) as error:
        place, what = "gallery" if isinstance(source, bytes) else source, one_line(error, 120)
        raise DataError(f"{place}: not a picture to show: {what} (use JPEG, PNG or WebP)") from error
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


def _file(path: Path) -> bytes:
    if not path.is_file():
        raise DataError("no such file")
    if path.stat().st_size > MAX_MEMBER_BYTES:
        raise DataError(f"more than {MAX_MEMBER_BYTES} bytes")
    return path.read_bytes()


# --------------------------------------------------------------------------------------------- reading
def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _is_share(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value <= 1)


_CARDS = records.items(
    records.fields(
        {
            "images": records.items(
                records.leaf("a name like gallery/000-0.jpg", lambda v: isinstance(v, str) and _NAME.fullmatch(v))
            ),
            "caption": records.leaf("a text", lambda v: isinstance(v, str)),
            "right": records.leaf("true, false or null", lambda v: v is None or isinstance(v, bool)),
            "rows": records.items(
                records.leaf("a name and one value", lambda v: _is_pair(v) and not isinstance(v[1], list | dict))
            ),
            "bars": records.items(
                records.leaf("a name and a share of 0 to 1", lambda v: _is_pair(v) and _is_share(v[1]))
            ),
        }
    )
)


def read_gallery(run_dir: Path) -> tuple[list[Card], int]:
    """The first 48 cards of a run's gallery, and how many there are; none without ``gallery.json``.

    Raises:
        DataError: the file is not in its format, or a picture is not there, not readable, or outside of the folder.
    """
    path = run_dir / FILE
    if not path.is_file():
        return [], 0
    entries = records.read_json(path)
    records.check(path, entries, _CARDS)
    return [_card(run_dir, entry) for entry in entries[:MAX_CARDS]], len(entries)


def _card(run_dir: Path, entry: Mapping[str, Any]) -> Card:
    rows = [[name, number(value)] for name, value in entry["rows"]]
    true = {value for name, value in rows if name.startswith("true")}
    bars = [
        Bar(name, share or 0.0, "not finite" if share is None else percent(share), name in true)
        for name, share in entry["bars"]
    ]
    pictures = [_data_address(run_dir, name) for name in entry["images"]]
    return Card(pictures, entry["caption"], entry["right"], Table([], rows, ""), bars)


def _data_address(run_dir: Path, name: str) -> str:
    data = _small_jpeg(run_dir / name)
    if not (run_dir / name).resolve().is_relative_to(run_dir.resolve()):
        raise DataError(f"{run_dir / name}: a link out of the run folder (copy the picture in)")
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()
