"""A sample and the ways in which it can be bad."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, one_line

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "json", "cls")
"""What a shard's members may be; anything else is left out unread."""

MAX_MEMBER_BYTES = 64 * 2**20
MAX_TEXT_BYTES = 64_000
MAX_KEY_LENGTH = 512

_NAME = re.compile(r"((?:[^/]+/)*[^/.]+)\.([^/]+)")


class BadSample(DataError):
    """A sample (or a whole shard) that training skips and counts, and that evaluation stops at.

    Args:
        message: the line to show.
        reason: short words to count by (``"checksum"``, ``"truncated"``, ``"image"``, ...).
        shard: file or address it came from; empty where that is not known yet.
        member: name or key inside the shard; empty when it is the shard as a whole.
        byte: position of a damaged header in the shard; none where it is not about one.
    """

    def __init__(
        self, message: str, *, reason: str = "bad", shard: str = "", member: str = "", byte: int | None = None
    ) -> None:
        super().__init__(one_line(message))
        self.reason, self.shard, self.member, self.byte = reason, shard, member, byte


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-cased extension of a member's name, or none when the name is refused.

    The key ends at the first dot of the last path part (webdataset's rule), so ``a/1.left.jpg`` is key ``a/1`` with
    extension ``left.jpg``. Refused: absolute names, empty, ``.`` and ``..`` parts, hidden files, unprintable
    characters, bytes that are not UTF-8, and keys longer than 512 characters.
    """
    match = _NAME.fullmatch(name.removeprefix("./"))
    if match is None or not name.isprintable():
        return None
    key, extension = match.groups()
    if len(key) > MAX_KEY_LENGTH or any(part in (".", "..") for part in key.split("/")):
        return None
    return key, extension.lower()


def size_limit(extension: str) -> int:
    """Most bytes that a member with this extension may have: 64 kB for text, 64 MiB otherwise."""
    return MAX_MEMBER_BYTES if extension in IMAGE_EXTENSIONS else MAX_TEXT_BYTES


@dataclass(frozen=True)
class Sample:
    """The members that share one key.

    Attributes:
        key: name without extension; unique within a shard, never used as a path.
        members: extension to bytes; extensions are among ``EXTENSIONS``.
        shard: file or address the sample came from.
        index: position in the set.
    """

    key: str
    members: dict[str, bytes]
    shard: str
    index: int

    def image(self) -> bytes:
        """The encoded picture; a :class:`BadSample` when there is none."""
        for extension in IMAGE_EXTENSIONS:
            if extension in self.members:
                return self.members[extension]
        raise self.bad("missing image", f"no member {', '.join(IMAGE_EXTENSIONS)}")

    def text(self, extension: str = "txt") -> str:
        """A member as text, without white space at its ends; a :class:`BadSample` when missing, empty or not UTF-8."""
        if extension not in self.members:
            raise self.bad("missing text", f"no member {extension}")
        try:
            text = self.members[extension].decode().strip()
        except UnicodeDecodeError as error:
            raise self.bad("text", f"member {extension} is not UTF-8 at byte {error.start}") from error
        if not text:
            raise self.bad("empty text", f"member {extension} is empty")
        return text

    def json(self) -> Any:
        """The ``json`` member's value; a :class:`BadSample` when missing or not JSON."""
        try:
            return json.loads(self.text("json"))
        except (ValueError, RecursionError) as error:
            raise self.bad("json", f"member json is not JSON: {error}") from error

    def captions(self) -> list[str]:
        """The sample's texts: ``captions`` of its json when it has them, else its txt.

        Raises:
            BadSample: there is none, or all are empty.
        """
        described = self.json() if "json" in self.members else {}
        listed = described.get("captions") if isinstance(described, dict) else None
        if not isinstance(listed, list):
            return [self.text()]
        texts = [text.strip() for text in listed if isinstance(text, str) and text.strip()]
        if not texts:
            raise self.bad("empty text", "captions in member json are empty")
        return texts

    def bad(self, reason: str, what: str) -> BadSample:
        """The error for this sample, naming shard and key."""
        return BadSample(f"{self.shard}:{self.key}: {what}", reason=reason, shard=self.shard, member=self.key)
