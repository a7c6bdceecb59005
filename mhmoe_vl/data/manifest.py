"""The manifest beside a shard: where every member lies and its checksum.

``name.tar`` has ``name.manifest.json``::

    {"version": 1, "shard": "name.tar", "size": bytes, "sha256": hex,
     "samples": [{"key": "000", "members": {"jpg": [offset, size, crc32], ...}}, ...]}

It buys random access, an exact count of samples, and certainty that no damaged byte is ever trained on: tar itself
has checksums for headers only.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError, one_line
from .sample import EXTENSIONS, size_limit, split_name
from .tar import BLOCK, Member, read_members

VERSION = 1
MAX_BYTES = 3 * 2**20
"""Most bytes of a manifest (some 30,000 samples): JSON takes up to thirty times its size once it is read."""
Place = tuple[int, int, int | None]
"""Offset and size of a member's data in bytes, and its crc32; none when nobody has read the data yet."""


@dataclass
class Index:
    """What a shard holds.

    Attributes:
        size: bytes of the shard.
        sha256: of the whole shard, hex; empty when only headers were read.
        samples: key to extension to place, in the order of the archive.
        left_out: (member name, reason) of every member that is no part of a sample.
    """

    size: int = 0
    sha256: str = ""
    samples: dict[str, dict[str, Place]] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def count_left_out(self) -> dict[str, int]:
        """How many members were left out, by reason."""
        return dict(Counter(reason for _, reason in self.left_out))


def member_at(index: Index, byte: int) -> str:
    """Name of the member whose header or data hold a byte of the shard; empty for padding."""
    for key, members in index.samples.items():
        for extension, (offset, size, _) in members.items():
            if offset - BLOCK <= byte < offset + size:
                return f"{key}.{extension}"
    return ""


def manifest_path(shard: str | Path) -> Path:
    """Where the manifest of a shard lies: ``a.tar`` -> ``a.manifest.json``."""
    return Path(str(shard).removesuffix(".tar") + ".manifest.json")


def refusal(member: Member) -> str | None:
    """Why a member can be no part of a sample; none when it can."""
    if member.kind != "file":
        return "not a file"
    split = split_name(member.name)
    if split is None:
        return "name"
    if split[1] not in EXTENSIONS:
        return "extension"
    return None if member.size <= size_limit(split[1]) else "size"


def scan(stream: BinaryIO, shard: str) -> Index:
    """The index of an archive from its headers alone; a seekable stream's data is not read.

    Raises:
        BadSample: the archive is damaged.
    """
    index = Index()
    for member, _ in read_members(stream, shard, lambda member: False):
        _add(index, member, None)
    return index


def scan_fully(stream: BinaryIO, shard: str) -> Index:
    """The index of an archive with the checksum of every member and of the whole; reads everything once.

    Raises:
        BadSample: the archive is damaged.
    """
    index = Index()
    hashing = _HashingStream(stream)
    for member, data in read_members(hashing, shard, lambda member: refusal(member) is None):
        _add(index, member, None if data is None else zlib.crc32(data))
    index.size, index.sha256 = hashing.size, hashing.sha256.hexdigest()
    return index


def _add(index: Index, member: Member, crc: int | None) -> None:
    """Enter a member, the first of a name winning; members of one key need not be neighbours."""
    if member.kind == "folder":
        return
    if reason := refusal(member):
        index.left_out.append((member.name, reason))
        return
    key, extension = split_name(member.name)
    places = index.samples.setdefault(key, {})
    if extension in places:
        index.left_out.append((member.name, "duplicate"))
    else:
        places[extension] = (member.offset, member.size, crc)


class _HashingStream:
    """A stream that cannot seek, so that every byte passes the hash."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.sha256, self.size = stream, hashlib.sha256(), 0

    def seekable(self) -> bool:
        return False

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.sha256.update(data)
        self.size += len(data)
        return data


def to_json(index: Index, shard_name: str) -> str:
    """The text of a manifest."""
    samples = [{"key": key, "members": members} for key, members in index.samples.items()]
    document = {"version": VERSION, "shard": shard_name, "size": index.size, "sha256": index.sha256, "samples": samples}
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n"
    if len(text.encode()) > MAX_BYTES:
        what = f"{len(samples)} samples make a manifest of more than {MAX_BYTES} bytes"
        raise DataError(f"{shard_name}: {what} (pack smaller shards)")
    return text


def from_json(text: str | bytes, path: str) -> Index:
    """The index in the text of a manifest; ``path`` is for messages.

    Raises:
        DataError: not a manifest, or one of another version.
    """
    if len(text) > MAX_BYTES:
        raise DataError(f"{path}: manifest of more than {MAX_BYTES} bytes (pack smaller shards)")
    try:
        document = json.loads(text)
        version = document["version"]
        if version == VERSION:
            samples = {entry["key"]: _places(entry["members"]) for entry in document["samples"]}
            if len(samples) != len(document["samples"]):
                raise ValueError("a key stands twice")
            return Index(_natural(document["size"]), str(document["sha256"]), samples)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = one_line(f"{type(error).__name__}: {error}", 100)
        raise DataError(f"{path}: not a manifest ({what}) (remove it and run mhmoe-vl make-manifest)") from error
    raise DataError(f"{path}: manifest version {version!r}, this is {VERSION} (make it again, or upgrade mhmoe-vl)")


def _places(members: dict[str, Any]) -> dict[str, Place]:
    if not members:
        raise ValueError("a sample without members")
    places = {}
    for extension, (offset, size, crc) in members.items():
        if extension not in EXTENSIONS or _natural(size) > size_limit(extension):
            raise ValueError(f"member {extension!r} of {size} bytes")
        places[extension] = (_natural(offset), size, _natural(crc))
    return places


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count of bytes")
    return value


def read_manifest(shard: str | Path) -> Index | None:
    """The manifest beside a local shard; none when there is none.

    Raises:
        DataError: it cannot be read, or is not a manifest.
    """
    path = manifest_path(shard)
    try:
        with path.open("rb") as file:
            return from_json(file.read(MAX_BYTES + 1), str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror} (make it readable)") from error


def make_manifest(shard: str | Path) -> Path:
    """Read a shard once and write the manifest beside it; returns its path.

    Raises:
        DataError: the shard is missing or damaged; an older manifest is then left as it was.
    """
    shard, path = Path(shard), manifest_path(shard)
    try:
        with shard.open("rb") as stream:
            index = scan_fully(stream, str(shard))
    except OSError as error:
        raise DataError(f"{shard}: {error.strerror} (name an existing tar file)") from error
    write_text(path, to_json(index, shard.name))
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: under another name, flushed to the disk, then renamed."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
