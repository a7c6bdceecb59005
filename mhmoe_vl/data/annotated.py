"""Examples that an annotation file describes and that name pictures in folders."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, one_line
from .records import TEXT, Problem, leaf
from .sample import IMAGE_EXTENSIONS, MAX_MEMBER_BYTES, BadSample

if TYPE_CHECKING:
    from torch import Tensor

Pictures = tuple[list[tuple[str, Path]], list[Problem]]
"""Places in a file with the pictures that they need, there or not; and what is wrong with these as a set."""
SOME_TEXT = leaf("a text that is not empty", lambda value: not TEXT(value) and bool(value.strip()))
SHOWN = 3
"""How many missing pictures a message names."""


@dataclass(frozen=True)
class Example:
    """One annotated example, a source for :mod:`.loader` when in a list.

    Attributes:
        key: unique in its split.
        record: what the annotation file says, in the task's own form.
        pictures: files that it needs, there or not.
        source: the annotation file.
    """

    key: str
    record: Any
    pictures: tuple[Path, ...]
    source: str

    def picture(self, number: int = 0) -> bytes:
        """An encoded picture; a :class:`BadSample` when it cannot be read."""
        path = self.pictures[number]
        try:
            return read_picture(path)
        except BadSample as error:
            raise self.bad(error.reason, str(error)) from error
        except OSError as error:
            raise self.bad("missing image", f"{path}: {error.strerror}") from error

    def pixels(self, transform: Callable[..., Tensor], *arguments: Any, number: int = 0) -> Tensor:
        """``transform(picture, *arguments)``; a :class:`BadSample` that names the picture when it is damaged."""
        data = self.picture(number)
        try:
            return transform(data, *arguments)
        except BadSample as error:
            raise self.bad(error.reason, f"{self.pictures[number]}: {error}") from error

    def bad(self, reason: str, what: str) -> BadSample:
        """The error for this example, naming file and key."""
        message = f"{self.source}: {self.key}: {what} (mend the picture; check-data lists all)"
        return BadSample(message, reason=reason, shard=self.source, member=self.key)


def read_picture(path: str | Path) -> bytes:
    """An encoded picture; OSError when it cannot be read.

    Raises:
        BadSample: it is larger than any picture should be.
    """
    path = Path(path)
    if path.stat().st_size > MAX_MEMBER_BYTES:
        raise BadSample(f"{path}: more than {MAX_MEMBER_BYTES} bytes", reason="image size")
    return path.read_bytes()


class PictureFolders:
    """The pictures in some folders and in the folders right below them, by file name.

    Args:
        folders: searched in this order; at least one.

    Raises:
        DataError: a folder is missing, or there is no picture in it.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        if not folders:
            raise DataError("no folder of pictures (name at least one)")
        self.first, self._places = Path(folders[0]), {}
        for folder in folders:
            found = list(pictures_in(Path(folder)))
            if not found:
                raise DataError(f"{folder}: no picture in it (name a folder of pictures)")
            for path in found:
                self._places.setdefault(path.name, path)

    def find(self, *names: str) -> Path:
        """Where the first of the names is that exists; where it would be when none does."""
        return next((self._places[name] for name in names if name in self._places), self.first / names[0])

    def find_ending(self, ending: str) -> Path:
        """The picture named ``<split>-<ending>``; a path that does not exist when there is none.

        Raises:
            DataError: pictures of two splits end so.
        """
        names = self._by_ending.get(ending, [f"*-{ending}"])
        if len(names) > 1:
            raise DataError(f"{self.first}: {names[0]} and {names[1]} end alike (name the folder of one split)")
        return self.find(names[0])

    @cached_property
    def _by_ending(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in sorted(self._places):
            found.setdefault(name.partition("-")[2], []).append(name)
        return found


def pictures_in(folder: Path) -> Iterator[Path]:
    """The pictures of a folder and of the folders right below it, in no order; nothing hidden.

    Raises:
        DataError: a folder cannot be read.
    """
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        inside = sorted(entry.path for entry in entries if entry.is_dir())
        for entry in [*entries, *(entry for place in inside for entry in os.scandir(place))]:
            if entry.name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and not entry.name.startswith("."):
                yield Path(entry.path)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror} (name a folder of pictures)") from error


def missing_pictures(examples: Iterable[Example]) -> list[Path]:
    """The pictures that are not there, each once."""
    wanted = dict.fromkeys(path for example in examples for path in example.pictures)
    return [path for path in wanted if not os.path.isfile(path)]


def require_pictures(examples: Sequence[Example]) -> None:
    """Refuse a split for evaluation that lacks pictures: a smaller test set is another test set.

    Raises:
        DataError: how many are missing, and the first three.
    """
    missing = missing_pictures(examples)
    if missing:
        named = ", ".join(one_line(path.name, 60) for path in missing[:SHOWN])
        what = f"{len(missing)} pictures missing: {named}{', ...' if len(missing) > SHOWN else ''}"
        raise DataError(f"{examples[0].source}: {what} (get them, or evaluate on a split that is whole)")


def held_out(
    keys: Iterable[Hashable], *, seed: int, count: int | None = None, fraction: float | None = None
) -> set[Any]:
    """``count``, or a ``fraction``, of the different keys, drawn by ``seed``; their order does not matter.

    Raises:
        DataError: nothing would be left.
    """
    different = sorted(set(keys))
    count = round(len(different) * fraction) if count is None else count
    if not 0 <= count < len(different):
        raise DataError(f"{count} of {len(different)} groups to hold out (hold out fewer)")
    return set(random.Random(seed).sample(different, count))
