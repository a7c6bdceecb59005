"""Pictures with a class each: class folders (ImageFolder), or shards with a ``cls`` member."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError, one_line
from .annotated import Example
from .loader import Source, StreamedShards, open_shards
from .records import TEXT, check, items, read_json, read_text
from .sample import IMAGE_EXTENSIONS, Sample
from .shards import ShardSet, expand_shards

LISTED = (*IMAGE_EXTENSIONS, "bmp", "gif", "pgm", "ppm", "tif", "tiff")
"""Files in a class folder that are samples. Those of other formats cannot be read, and must not go unnoticed."""
MAX_NAME_BYTES = 255
_NUMBER = re.compile(r"[0-9]{1,9}")


class ImageFolder(Sequence[Example]):
    """The pictures below class folders: classes in the given order, pictures by name.

    ``record`` of an example is the number of its class, ``key`` its path below ``root``.

    Args:
        root: holds one folder per class.
        classes: names of the folders, in the order of their numbers.

    Raises:
        DataError: a class has no folder or no picture, or a folder is no class.
    """

    def __init__(self, root: str | Path, classes: Sequence[str]) -> None:
        self.root = Path(root)
        _refuse_other_classes(self.root, class_folders(self.root), classes)
        self.keys: list[str] = []
        counts = []
        for name in classes:
            found = sorted(_pictures_below(self.root / name))
            if not found:
                raise DataError(f"{self.root / name}: no picture in it (add some, or leave the class out)")
            self.keys += [f"{name}/{path}" for path in found]
            counts.append(len(found))
        self.labels = np.repeat(np.arange(len(counts)), counts)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> Example:
        key = self.keys[number]
        return Example(key, int(self.labels[number]), (self.root / key,), str(self.root))


class Chosen(Sequence[Example | Sample]):
    """Some samples of a source, by their numbers in it."""

    def __init__(self, source: Sequence[Example | Sample], numbers: Sequence[int]) -> None:
        self.source, self.numbers = source, np.asarray(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Example | Sample:
        return self.source[int(self.numbers[number])]


def open_labelled(place: str | Sequence[str], root: Path, classes: Sequence[str]) -> Source:
    """Class folders, or shards in every form that :func:`.shards.expand_shards` reads.

    Raises:
        ConfigError, DataError: there is neither, or what is there does not fit ``classes``.
    """
    folder = class_root(place, root)
    return open_shards(expand_shards(place, root)) if folder is None else ImageFolder(folder, classes)


def class_root(place: str | Sequence[str], root: Path) -> Path | None:
    """The folder of class folders that ``place`` names; none when it names shards."""
    folder = root / place if isinstance(place, str) else None
    return folder if folder and folder.is_dir() and not any(folder.glob("*.tar")) else None


def class_folders(root: Path) -> list[str]:
    """Names of the folders in ``root``, sorted, hidden ones left out.

    Raises:
        DataError: there are none, or a name cannot be written as UTF-8.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{root}: {error.strerror} (name a folder of class folders)") from error
    if not names:
        raise DataError(f"{root}: no class folder and no *.tar in it (expected {root.name}/CLASS/*.jpg)")
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{root}: class {one_line(ascii(name), 60)} is not UTF-8 (rename the folder)") from error
    return names


def read_classes(path: Path) -> list[str]:
    """Names of classes in the order of their numbers: a JSON list of texts, or one a line.

    Raises:
        DataError: the file is neither, is empty, or a name stands twice or has more than 255 bytes.
    """
    if path.suffix == ".json":
        names = read_json(path)
        check(path, names, items(TEXT))
    else:
        names = read_text(path).splitlines()
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        what = f"class {one_line(twice[0], 60)!r} stands twice" if twice else "no class"
        raise DataError(f"{path}: {what} (list different names)")
    for number, name in enumerate(names):
        if not name.strip() or len(name.encode()) > MAX_NAME_BYTES:
            raise DataError(f"{path}: class {number}: {one_line(name, 40)!r} (name it in 1 to {MAX_NAME_BYTES} bytes)")
    return names


def label_in_shard(sample: Sample, num_classes: int) -> int:
    """The class number in a sample's ``cls``.

    Raises:
        BadSample: there is none, or it is not among the classes.
    """
    if "cls" not in sample.members:
        raise sample.bad("missing class", "no member cls (pack it with one; unpack a tar of class folders)")
    text = sample.text("cls")
    if not _NUMBER.fullmatch(text) or int(text) >= num_classes:
        what = f"member cls is {one_line(text, 30)!r}"
        raise sample.bad("class", f"{what} (a class is a number of 0 to {num_classes - 1}; check task.classes)")
    return int(text)


def sample_keys(source: Source) -> Sequence[str | int]:
    """What a record calls each sample by: its path in class folders, its number in shards; none in streamed ones."""
    if isinstance(source, StreamedShards):
        return ()
    return range(len(source)) if isinstance(source, ShardSet) else source.keys


def _pictures_below(folder: Path) -> Iterator[str]:
    """Paths below ``folder``; nothing hidden, links followed."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror} (mend the folder)") from error

    for place, inside, names in os.walk(folder, onerror=refuse, followlinks=True):
        inside[:] = [name for name in inside if not name.startswith(".")]
        below = os.path.relpath(place, folder)
        for name in names:
            if name.rpartition(".")[2].lower() in LISTED and not name.startswith("."):
                yield name if below == "." else f"{below}/{name}"


def _refuse_other_classes(root: Path, found: Sequence[str], classes: Sequence[str]) -> None:
    for names, others, what in ((found, classes, "is not among"), (classes, found, "has no folder, but is among")):
        more = sorted(set(names) - set(others))
        if more:
            count = f" (and {len(more) - 1} more)" if len(more) > 1 else ""
            what = f"class {one_line(more[0], 60)!r}{count} {what} the {len(classes)} classes"
            raise DataError(f"{root}: {what} (make the folders those of the class list)")
