"""A strict reader of tar archives: damage is an error with a place, never a silent end.

``tarfile`` in stream mode takes a damaged header, and a cut between two members, for the end of the archive. Here
the two zero blocks that end an archive must be there, with nothing but zeros after them. Member data is only held
when asked for, and nothing is ever extracted.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from .sample import BadSample

BLOCK = tarfile.BLOCKSIZE
CHUNK = 2**20
MAX_EXTENDED_HEADER = 64 * 1024
MAX_DATA_BYTES = 2**50

EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)


class Member(NamedTuple):
    """A member of an archive; ``offset`` and ``size`` of its data in bytes, ``kind`` file, folder or other."""

    name: str
    offset: int
    size: int
    kind: str


def read_members(
    stream: BinaryIO, shard: str, wanted: Callable[[Member], bool]
) -> Iterator[tuple[Member, bytes | None]]:
    """Every member of an archive, in order, with the data of those files for which ``wanted`` says so.

    Args:
        stream: read from its start; unwanted data is sought over where the stream can seek, read otherwise.
        shard: name for messages.
        wanted: asked before data is held in memory, so size limits belong here.

    Raises:
        BadSample: reason ``"truncated"`` (cut, or no end-of-archive blocks), ``"header"`` (damaged header) or
            ``"trailing data"`` (something after the end). Members before the damage have been yielded.
    """
    reader = _Reader(stream, shard)
    extended: dict[str, str] = {}
    while (header := reader.header()) is not None:
        if header.type in EXTENDED:
            extended |= _extended(header.type, reader.data(min(header.size, MAX_EXTENDED_HEADER + 1)), reader)
            continue
        member = _member(header, extended, reader)
        extended = {}
        if member.kind == "file" and wanted(member):
            yield member, reader.data(member.size)
        else:
            reader.skip(member.size)
            yield member, None


def _member(header: tarfile.TarInfo, extended: dict[str, str], reader: _Reader) -> Member:
    size = extended.get("size", str(header.size))
    if not size.isdecimal() or int(size) > MAX_DATA_BYTES:
        raise reader.error("header", f"member size {size}")
    sparse = any(key.startswith("GNU.sparse") for key in extended)
    kind = "folder" if header.isdir() else "other"
    if header.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not sparse:
        kind = "file"
    stored = 0 if header.type in WITHOUT_DATA else int(size)
    return Member(extended.get("path", header.name), reader.position, stored, kind)


def _extended(kind: bytes, data: bytes, reader: _Reader) -> dict[str, str]:
    """What an extended header says of the next member; pax records are ``length key=value`` lines."""
    if len(data) > MAX_EXTENDED_HEADER:
        raise reader.error("header", f"extended header of more than {MAX_EXTENDED_HEADER} bytes")
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode(errors="surrogateescape")}
    records = {}
    while kind == tarfile.XHDTYPE and data:
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not len(length) + 2 < int(length) <= len(data):
            raise reader.error("header", "damaged pax record")
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        records[key.decode(errors="surrogateescape")] = value.decode(errors="surrogateescape")
        data = data[int(length) :]
    return records


class _Reader:
    """Blocks of a stream, counted, with short reads turned into errors."""

    def __init__(self, stream: BinaryIO, shard: str) -> None:
        self.stream, self.shard, self.position = stream, shard, 0

    def error(self, reason: str, what: str) -> BadSample:
        message = f"{self.shard}:byte {self.position}: {what} (fetch or pack the shard again)"
        return BadSample(message, reason=reason, shard=self.shard, byte=self.position if reason == "header" else None)

    def header(self) -> tarfile.TarInfo | None:
        """The next header; none at a proper end of the archive."""
        block = self.read(BLOCK, "the end-of-archive mark")
        if not any(block):
            return self.end()
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            self.position -= BLOCK
            raise self.error("header", f"not a tar header ({error})") from error

    def end(self) -> None:
        if any(self.read(BLOCK, "the second end-of-archive block")):
            raise self.error("trailing data", "data after an empty block")
        while chunk := self.stream.read(CHUNK):
            if chunk.count(0) != len(chunk):
                raise self.error("trailing data", "data after the end of the archive")

    def data(self, size: int) -> bytes:
        data = self.read(size, "the member's data")
        self.read(-size % BLOCK, "the member's data")
        return data

    def skip(self, size: int) -> None:
        padded = size + -size % BLOCK
        if self.stream.seekable():
            self.stream.seek(padded, 1)
            self.position += padded
            return
        while padded > 0:
            padded -= len(self.read(min(CHUNK, padded), "the member's data"))

    def read(self, size: int, what: str) -> bytes:
        data = self.stream.read(size) if size else b""
        self.position += len(data)
        if len(data) < size:
            raise self.error("truncated", f"ends inside or before {what}")
        return data
