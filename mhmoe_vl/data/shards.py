"""Reading shards: what a shard list means, random access by manifest, and plain streaming.

Shards are tar archives as img2dataset and open_clip write them (``key.jpg key.txt key.json``), local or over http(s).
Members are bytes until a task decodes them; nothing is unpickled, unpacked or run.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ConfigError, DataError
from .manifest import MAX_BYTES, Index, from_json, make_manifest, read_manifest, refusal, scan
from .remote import RemoteStream, check_scheme, fetch_optional, fetch_range, is_url
from .sample import EXTENSIONS, MAX_MEMBER_BYTES, BadSample, Sample, split_name
from .tar import read_members

__all__ = ["BadSample", "NoIndexError", "Sample", "ShardSet", "expand_shards", "make_manifest", "stream_samples"]

MAX_SHARDS = 1_000_000
MAX_SAMPLE_BYTES = MAX_MEMBER_BYTES + 2**20
"""Most bytes from the first to the last member of a sample: one picture of the largest size, and texts."""
OPEN_SHARDS = 64
_BRACES = re.compile(r"\{([^{}]*)\}")


class NoIndexError(DataError):
    """A remote shard has no manifest beside it, so it can be streamed but not read at random."""


# ------------------------------------------------------------------------------------------ shard lists
def expand_shards(spec: str | Sequence[str], root: str | Path = ".") -> list[str]:
    """The shards that a configuration names, in order.

    Args:
        spec: a tar file, a folder (its ``*.tar``, sorted), an http(s) address, a brace pattern (``{000000..000999}`` or
            ``{a,b}``), several of these joined by ``::``, or a list of all that.
        root: folder that relative paths start from.

    Raises:
        ConfigError: another protocol (``pipe:``), a malformed pattern, more than a million shards, or none at all.
        DataError: a path that does not exist, a folder without shards, or a shard named twice.
    """
    parts = [part for entry in ([spec] if isinstance(spec, str) else spec) for part in entry.split("::")]
    shards = [shard for part in parts for name in _expand_braces(part) for shard in _locate(name, Path(root))]
    if not shards:
        raise ConfigError(f"{spec!r}: names no shards (give a folder, a tar file or an address)")
    if len(set(shards)) != len(shards):
        twice = next(shard for number, shard in enumerate(shards) if shard in shards[:number])
        raise DataError(f"{twice}: named twice in {spec!r} (name it once)")
    return shards


def _expand_braces(pattern: str) -> Iterator[str]:
    literals = _BRACES.split(pattern)
    choices = [_choices(body, pattern) for body in literals[1::2]]
    if any(brace in "".join(literals[::2]) for brace in "{}"):
        raise ConfigError(f"{pattern}: unbalanced braces (write one pair, as in {{000000..000999}})")
    if (count := math.prod(map(len, choices))) > MAX_SHARDS:
        raise ConfigError(f"{pattern}: {count} shards, at most {MAX_SHARDS} are read (name fewer)")
    for chosen in itertools.product(*choices):
        yield "".join(itertools.chain.from_iterable(itertools.zip_longest(literals[::2], chosen, fillvalue="")))


class _Numbers(Sequence[str]):
    """The numbers of ``{first..last}``, zero-padded as ``first`` is, without making the list."""

    def __init__(self, first: str, last: str) -> None:
        self.numbers, self.width = range(int(first), int(last) + 1), len(first)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> str:
        return f"{self.numbers[index]:0{self.width}d}"


def _choices(body: str, pattern: str) -> Sequence[str]:
    if match := re.fullmatch(r"(\d{1,15})\.\.(\d{1,15})", body):
        first, last = match.groups()
        if int(first) > int(last):
            raise ConfigError(f"{pattern}: {{{body}}} runs backwards (write the smaller number first)")
        return _Numbers(first, last)
    if "," not in body:
        raise ConfigError(f"{pattern}: {{{body}}} is no range and no list (write {{000..999}} or {{a,b}})")
    return body.split(",")


def _locate(name: str, root: Path) -> list[str]:
    check_scheme(name)
    if is_url(name):
        return [name]
    path = root / name
    if path.is_dir():
        if not (found := sorted(path.glob("*.tar"))):
            raise DataError(f"{path}: no *.tar in this folder (name a folder with shards)")
        return [str(shard) for shard in found]
    if not path.is_file():
        raise DataError(f"{path}: no such shard or folder (check the path; relative ones start from {root})")
    return [str(path)]


# ---------------------------------------------------------------------------------------- random access
@dataclass(frozen=True)
class _Table:
    """An index as arrays: a sample's members are rows ``starts[i] : starts[i + 1]``; crc is -1 where unknown."""

    keys: list[str]
    starts: np.ndarray
    extensions: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, index: Index) -> _Table:
        rows = [
            (EXTENSIONS.index(extension), offset, size, -1 if crc is None else crc)
            for members in index.samples.values()
            for extension, (offset, size, crc) in members.items()
        ]
        starts = np.cumsum([0, *map(len, index.samples.values())])
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        return cls(list(index.samples), starts, table[:, 0].astype(np.uint8), table[:, 1:].copy())

    def members(self, number: int) -> list[tuple[str, int, int, int]]:
        rows = slice(self.starts[number], self.starts[number + 1])
        return [
            (EXTENSIONS[code], *map(int, place))
            for code, place in zip(self.extensions[rows], self.places[rows], strict=True)
        ]


class _OpenShard:
    """A shard's table and, for a local one, its file.

    Reads name their offset and never move the file's own position, so forked processes may share the descriptor.
    """

    def __init__(self, url: str, table: _Table) -> None:
        self.url, self.table = url, table
        self.descriptor = None if is_url(url) else os.open(url, os.O_RDONLY)

    def __del__(self) -> None:
        if getattr(self, "descriptor", None) is not None:
            os.close(self.descriptor)

    def read(self, start: int, size: int) -> bytes:
        if self.descriptor is None:
            return fetch_range(self.url, start, size)
        return os.pread(self.descriptor, size, start)


class ShardSet(Sequence[Sample]):
    """The samples of some shards by number, each member checked against the manifest's checksum.

    A local shard without a manifest is indexed by its headers when the set is made (there is nothing to check its data
    against then). The number of a sample is its place in shard order; ``sizes`` says how many each shard has.

    Args:
        urls: from :func:`expand_shards`.

    Attributes:
        sizes: samples per shard.

    Raises:
        NoIndexError: a remote shard has no manifest.
        DataError: a manifest is not readable, or a shard without manifest is damaged.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = list(urls)
        self.sizes = [len(_load_index(url).samples) for url in self.urls]
        self._starts = np.cumsum([0, *self.sizes])
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> Sample:
        """Sample ``number``; a :class:`BadSample` when it cannot be read whole or fails its checksum."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        url = self.urls[shard]
        try:
            opened = self._shard(shard)
            local = int(number - self._starts[shard])
            key, places = opened.table.keys[local], opened.table.members(local)
            return Sample(key, _read(opened, key, places), url, int(number))
        except OSError as error:
            message = f"{url}: {error.strerror or error} (check the file)"
            raise BadSample(message, reason="unreadable", shard=url) from error

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": OrderedDict()}

    def _shard(self, shard: int) -> _OpenShard:
        """The open shard; the least recently used of too many is closed."""
        if shard not in self._open:
            try:
                table = _Table.of(_load_index(self.urls[shard]))
            except NoIndexError as error:
                raise BadSample(str(error), reason="unreachable", shard=self.urls[shard]) from error
            if len(table.keys) != self.sizes[shard]:
                what = f"{len(table.keys)} samples, there were {self.sizes[shard]}"
                raise DataError(f"{self.urls[shard]}: changed while in use: {what} (start again)")
            self._open[shard] = _OpenShard(self.urls[shard], table)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]


def fetch_manifest(url: str) -> Index | None:
    """The manifest beside a shard, local or remote; none when there is none."""
    if not is_url(url):
        return read_manifest(url)
    address = url.removesuffix(".tar") + ".manifest.json"
    text = fetch_optional(address, MAX_BYTES)
    return None if text is None else from_json(text, address)


def _load_index(url: str) -> Index:
    if (index := fetch_manifest(url)) is not None:
        return index
    if is_url(url):
        raise NoIndexError(f"{url}: no manifest beside it (run mhmoe-vl make-manifest where the shards lie)")
    try:
        with open(url, "rb") as stream:
            index = scan(stream, url)
            index.size = os.fstat(stream.fileno()).st_size
        return index
    except OSError as error:
        raise DataError(f"{url}: {error.strerror} (name an existing tar file)") from error


def _read(shard: _OpenShard, key: str, places: list[tuple[str, int, int, int]]) -> dict[str, bytes]:
    """The members of a sample in one read: writers put them side by side."""
    start = min(offset for _, offset, _, _ in places)
    stop = max(offset + size for _, offset, size, _ in places)
    if stop - start > MAX_SAMPLE_BYTES:
        raise _bad(shard.url, key, "scattered", f"members spread over {stop - start} bytes (pack the shard again)")
    block = shard.read(start, stop - start)
    members = {}
    for extension, offset, size, crc in places:
        data = block[offset - start : offset - start + size]
        if len(data) != size:
            raise _bad(shard.url, f"{key}.{extension}", "truncated", "the shard ends before it (fetch the shard again)")
        if crc >= 0 and zlib.crc32(data) != crc:
            raise _bad(shard.url, f"{key}.{extension}", "checksum", "differs from the manifest (fetch the shard again)")
        members[extension] = data
    return members


def _bad(url: str, member: str, reason: str, what: str) -> BadSample:
    return BadSample(f"{url}:{member}: {what}", reason=reason, shard=url, member=member)


# -------------------------------------------------------------------------------------------- streaming
def stream_samples(urls: Sequence[str], on_bad: Callable[[BadSample], None]) -> Iterator[Sample]:
    """The samples of some shards one after the other; needs no manifest and checks none.

    Neighbouring members with one key form a sample. What cannot be read goes to ``on_bad``, at most the rest of a shard
    at a time: unreachable or damaged shards, and keys that come back after others (``"duplicate"``). A sample that
    damage may have cut short is not delivered.

    Args:
        urls: from :func:`expand_shards`.
        on_bad: told of every loss; may raise to stop.
    """
    number = 0
    for url in urls:
        try:
            with open_stream(url) as stream:
                for key, members in _groups(stream, url, on_bad):
                    yield Sample(key, members, url, number)
                    number += 1
        except BadSample as error:
            on_bad(error)
        except OSError as error:
            on_bad(BadSample(f"{url}: {error.strerror or error} (check the file)", reason="unreadable", shard=url))


def open_stream(url: str) -> AbstractContextManager:
    """A shard, local or remote, to be read from its start."""
    return RemoteStream(url) if is_url(url) else open(url, "rb")


def _groups(stream: object, url: str, on_bad: Callable[[BadSample], None]) -> Iterator[tuple[str, dict[str, bytes]]]:
    current: str | None = None
    members: dict[str, bytes] = {}
    seen: set[str] = set()
    for member, data in read_members(stream, url, lambda member: refusal(member) is None):
        if data is None:
            continue
        key, extension = split_name(member.name)
        if key != current:
            if members:
                yield current, members
            current, members = key, {}
        if sum(map(len, members.values())) + len(data) > MAX_SAMPLE_BYTES:
            what = f"sample of more than {MAX_SAMPLE_BYTES} bytes (pack smaller pictures)"
            on_bad(_bad(url, member.name, "size", what))
            continue
        if (key in seen and not members) or extension in members:
            on_bad(_bad(url, member.name, "duplicate", "this name or key came before (pack the shard again)"))
            continue
        seen.add(key)
        members[extension] = data
    if members:
        yield current, members
