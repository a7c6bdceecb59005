"""What routing is shown of: pictures and captions from the command line, from folders and from shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from ..data.annotated import pictures_in
from ..data.sample import IMAGE_EXTENSIONS, MAX_MEMBER_BYTES, BadSample, Sample
from ..data.shards import expand_shards, stream_samples
from ..data.transforms import ImageTransform, decode_image
from ..errors import ConfigError, DataError

MAX_ASPECT = 10
"""A picture longer than this is refused: a crop would show next to nothing of it."""
SHOWN_SIDE = 448
"""Pixels of the longer side of pictures on the page."""


@dataclass(frozen=True)
class Item:
    """A picture, a text, or a pair of them.

    Attributes:
        name: file name, or key in a shard.
        place: what errors name.
        label: class folder or ``cls`` member; empty without one.
        picture: encoded.
        text: caption.
        typed: whether the text was typed; one from a shard is cut to the model's length, as in training.
    """

    name: str
    place: str
    label: str = ""
    picture: bytes | None = None
    text: str | None = None
    typed: bool = False


def gather(images: Sequence[str], texts: Sequence[str], limit: int) -> list[Item]:
    """The items that a command line names, at most ``limit`` of each folder or set of shards.

    Args:
        images: picture files, folders (their pictures, and those of class folders right below), and shards: tar
            files, folders of them, patterns or http(s) addresses.
        texts: captions: one for every picture file, in order, or without pictures texts that stand alone.
        limit: most items of a folder or of shards.

    Raises:
        ConfigError: texts that are empty or do not fit the number of pictures.
        DataError: a file or folder that cannot be read, or a folder without pictures.
    """
    if any(not text.strip() for text in texts):
        raise ConfigError("--text: empty (write a caption, or leave --text out)")
    if not images:
        return [Item(f"text {number}", "--text", text=text.strip(), typed=True) for number, text in enumerate(texts, 1)]
    items = [item for name in images for item in islice(_named(name), limit)]
    if not texts:
        return items
    if len(texts) != len(items) or any(item.text for item in items):
        what = f"{len(texts)} captions for {len(items)} pictures"
        raise ConfigError(f"--text: {what} (give one for every picture file; shards bring their own)")
    return [replace(item, text=text.strip(), typed=True) for item, text in zip(items, texts, strict=True)]


def _named(name: str) -> Iterator[Item]:
    """The items behind one value of ``--image``."""
    path = Path(name)
    is_pattern = not path.exists() and ("{" in name or "://" in name)
    if is_pattern or path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        return map(_of_sample, stream_samples(expand_shards(name), _refuse))
    if path.is_dir():
        return _of_folder(path)
    return iter([Item(path.name, name, picture=_read(path))])


def _of_folder(folder: Path) -> Iterator[Item]:
    found = sorted(pictures_in(folder))
    if not found:
        raise DataError(f"{folder}: no picture in it (name a folder of pictures or shards)")
    for path in found:
        label = path.parent.name if path.parent != folder else ""
        yield Item(path.name, str(path), label=label, picture=_read(path))


def _of_sample(sample: Sample) -> Item:
    picture = sample.image() if set(IMAGE_EXTENSIONS) & sample.members.keys() else None
    text = sample.text() if "txt" in sample.members else None
    if picture is None and text is None:
        raise sample.bad("empty", "neither picture nor text")
    label = sample.text("cls") if "cls" in sample.members else ""
    return Item(sample.key, f"{sample.shard}:{sample.key}", label=label, picture=picture, text=text)


def _refuse(error: BadSample) -> NoReturn:
    raise error


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_MEMBER_BYTES:
            raise DataError(f"{path}: more than {MAX_MEMBER_BYTES} bytes (give a smaller picture)")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror} (name a picture, a folder of pictures or a shard)") from error


def open_picture(item: Item, img_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The largest centred crop of the item's picture in the shape of ``img_size``, as the model sees it and larger, for
    people: two uint8 tensors (3, H, W).

    Raises:
        DataError: the picture cannot be decoded, or is more than :data:`MAX_ASPECT` times as long as wide.
    """
    scale = SHOWN_SIDE / max(img_size)
    shown = (round(img_size[0] * scale), round(img_size[1] * scale))
    try:
        _, height, width = decode_image(item.picture).shape
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise DataError(f"picture of {width} x {height} pixels, longer than {MAX_ASPECT} to 1")
        return ImageTransform(img_size, second_size=shown)(item.picture, None)
    except DataError as error:
        raise DataError(f"{item.place}: {error} (give another picture)") from error
