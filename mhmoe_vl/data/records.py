"""Annotation files: JSON, JSON lines and gzipped either, read strictly and checked before anything uses them.

:func:`read_json` and :func:`read_json_lines` refuse what ``json`` lets pass: duplicate keys, NaN, numbers that
overflow, byte order marks, cut files. :func:`check` then holds the value against a description made of small checks::

    ANNOTATION = fields({"image_id": WHOLE, "bbox": numbers(4)})
    check(path, read_json(path), fields({"annotations": items(ANNOTATION, unique="image_id")}))

    annotations.json: annotations[17].bbox: need 4 numbers, got null; and 3 more problems (mend the file)
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import DataError, one_line

MAX_BYTES = 4 * 2**30
"""Most bytes that an annotation file may have once unpacked."""
SHOWN = 3
"""How many problems an error's one line names; the others are counted."""

MISSING, NEED, TWICE = "missing", "need ", "stands already at"
"""Words by which :func:`reason` knows a problem."""

_MAX_DEPTH = 100
_GZIP = b"\x1f\x8b"
_TOKEN = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")(\s*:)?|[{}\[\]]|[^\s"{}\[\],:]+')

Problem = tuple[str, str]
"""Place inside the value (``annotations[17].bbox``; empty for the value itself) and what is wrong there."""
Check = Callable[[Any], Sequence[Problem]]
"""Finds what is wrong with a value; empty when it is as it should be."""


class BadRecords(DataError):
    """A file whose values are not what they should be.

    Args:
        path: the file.
        problems: all of them; the message names the first few.
    """

    def __init__(self, path: str | Path, problems: Sequence[Problem]) -> None:
        self.lines = [f"{path}: {_line(problem)}" for problem in problems]
        named = [_line(problem) for problem in problems[:SHOWN]]
        if more := len(problems) - len(named):
            named.append(f"and {more} more problem{'s' if more > 1 else ''}")
        super().__init__(f"{path}: {'; '.join(named)} (mend the file)")


def _line(problem: Problem) -> str:
    return one_line(": ".join(filter(None, problem)), 120)


# --------------------------------------------------------------------------------------------- reading
def read_json(path: str | Path) -> Any:
    """The value in a JSON file, gzipped or not.

    Raises:
        DataError: it is missing, cut, too large, not UTF-8, not JSON, or holds a key twice or a number that is not
            finite; the message names line and byte.
    """
    return parse_json(read_text(path), path)


def read_json_lines(path: str | Path) -> list[Any]:
    """The values of a file with one JSON value a line, gzipped or not; value ``i`` stands in line ``i + 1``.

    Raises:
        DataError: as for :func:`read_json`, or a line is blank.
    """
    return [parse_json(line, path, number) for number, line in split_lines(read_text(path)).items()]


def split_lines(text: str) -> dict[int, str]:
    """The lines of a text by their numbers; only line feeds end one."""
    return dict(enumerate(text.removesuffix("\n").split("\n"), 1))


def read_text(path: str | Path) -> str:
    """A whole UTF-8 file, unpacked when it is gzipped.

    Raises:
        DataError: it is missing, unreadable, too large, cut, not UTF-8, or starts with a byte order mark.
    """
    data = _read_bytes(Path(path))
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: byte 0: a byte order mark (save it as UTF-8 without BOM)")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line}, byte {error.start}: not UTF-8 (save it as UTF-8)") from error


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            packed = file.peek(2)[:2] == _GZIP
            data = _read_up_to_limit(gzip.GzipFile(fileobj=file) if packed else file, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file: {one_line(error, 80)} (get it again)") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror} (name a readable file)") from error
    return data


def _read_up_to_limit(stream: Any, path: Path) -> bytes:
    data = bytearray()
    while chunk := stream.read(2**24):
        data += chunk
        if len(data) > MAX_BYTES:
            raise DataError(f"{path}: more than {MAX_BYTES} bytes (name an annotation file)")
    return bytes(data)


class _Refused(Exception):
    """Valid for ``json``, not for us; where it stands is looked for afterwards."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Refused
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _Refused
    return number


def parse_json(text: str, path: str | Path, line: int = 1) -> Any:
    """The value of ``text``, which starts in the given line of the file.

    Raises:
        DataError: as for :func:`read_json`.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
    except json.JSONDecodeError as error:
        if not text.strip():
            _fail(path, text, line, 0, "nothing here", "remove the line, or get the file again")
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        what = "JSON ends in the middle" if cut else f"not JSON: {error.msg}"
        _fail(path, text, line, error.pos, what, "get the file again" if cut else "mend the file")
    except (_Refused, RecursionError, ValueError):
        _fail(path, text, line, *_find_refused(text), "mend the file")


def _find_refused(text: str) -> tuple[int, str]:
    """Character and description of the first thing that is JSON to ``json`` and not to us."""
    keys: list[set[str]] = []
    for token in _TOKEN.finditer(text):
        string, colon = token.groups()
        if token[0] in "{[":
            keys.append(set())
            if len(keys) > _MAX_DEPTH:
                return token.start(), f"nested deeper than {_MAX_DEPTH} levels"
        elif token[0] in "}]":
            keys.pop()
        elif colon:
            key = json.loads(string)
            if key in keys[-1]:
                return token.start(), f"key {show(key)} stands twice in one object"
            keys[-1].add(key)
        elif not string and not _is_sound(token[0]):
            return token.start(), f"{one_line(token[0], 30)} is no finite number"
    return 0, "not JSON"


def _is_sound(word: str) -> bool:
    try:
        return word in ("true", "false", "null") or math.isfinite(float(word) if set(word) & set(".eE") else int(word))
    except (ValueError, OverflowError):
        return False


def _fail(path: str | Path, text: str, line: int, position: int, what: str, remedy: str) -> NoReturn:
    before = text[:position]
    place = f"line {line + before.count(chr(10))}, byte {len(before.encode())}"
    raise DataError(f"{path}: {place}: {what} ({remedy})") from None


# -------------------------------------------------------------------------------------------- checking
def check(path: str | Path, value: Any, wanted: Check) -> None:
    """Hold a file's value against its description.

    Raises:
        BadRecords: it is not as described; all problems at once.
    """
    if problems := wanted(value):
        raise BadRecords(path, problems)


def check_lines(path: str | Path, values: Sequence[Any], wanted: Check, *, unique: str | None = None) -> None:
    """Hold every value of a JSON-lines file against the description of one; places read ``line 17: key``.

    Raises:
        BadRecords: as for :func:`check`.
    """
    if problems := line_problems(dict(enumerate(values, 1)), wanted, unique=unique):
        raise BadRecords(path, problems)


def line_problems(values: Mapping[int, Any], wanted: Check, *, unique: str | None = None) -> list[Problem]:
    """What is wrong with values that stand in these lines."""
    found = [(f"line {line}", place, what) for line, value in values.items() for place, what in wanted(value)]
    problems = [(": ".join(filter(None, [line, place])), what) for line, place, what in found]
    if unique:
        lines = [f"line {line}" for line in values]
        problems += _repeated(list(values.values()), unique, lines.__getitem__, ": ")
    return problems


def leaf(need: str, fits: Callable[[Any], bool]) -> Check:
    """A check of one value by a predicate; ``need`` completes "need ..., got ..."."""
    return lambda value: () if fits(value) else [("", f"{NEED}{need}, got {show(value)}")]


WHOLE = leaf("a whole number", lambda value: type(value) is int and -(2**63) <= value < 2**63)
NUMBER = leaf("a number", lambda value: _is_number(value))
TEXT = leaf("a text", lambda value: isinstance(value, str) and _is_unicode(value))
ANYTHING = leaf("anything", lambda value: True)
BOOLEAN = leaf("true or false", lambda value: isinstance(value, bool))


def numbers(count: int) -> Check:
    """A list of exactly ``count`` finite numbers."""

    def fits(value: Any) -> bool:
        return isinstance(value, list) and len(value) == count and all(map(_is_number, value))

    return leaf(f"{count} numbers", fits)


def one_of(*choices: str) -> Check:
    """One of the given texts, as it is written."""
    return leaf(" or ".join(map(show, choices)), lambda value: isinstance(value, str) and value in choices)


def fields(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """An object with the required keys, and with fitting values under the optional ones; other keys may be there."""
    is_object = leaf("an object", lambda value: isinstance(value, dict))

    def find(value: Any) -> Sequence[Problem]:
        if problems := is_object(value):
            return problems
        found = [(key, MISSING) for key in required if key not in value]
        for key, wanted in [*required.items(), *(optional or {}).items()]:
            if key in value and (inner := wanted(value[key])):
                found += [(_join(key, place), what) for place, what in inner]
        return found

    return find


def items(wanted: Check, *, unique: str | None = None, least: int = 0) -> Check:
    """A list of ``least`` or more fitting values; with ``unique``, of objects that all differ in the value under this
    key."""
    is_list = leaf("a list", lambda value: isinstance(value, list))

    def find(value: Any) -> Sequence[Problem]:
        if problems := is_list(value):
            return problems
        if len(value) < least:
            return [("", f"{NEED}at least {least}, got {len(value) or 'none'}")]
        found = [(_join(f"[{index}]", place), what) for index, item in enumerate(value) for place, what in wanted(item)]
        return [*found, *_repeated(value, unique, lambda index: f"[{index}]", ".")] if unique else found

    return find


def every(*wanted: Check) -> Check:
    """All that any of these checks finds."""
    return lambda value: [problem for check in wanted for problem in check(value)]


def sound(value: Any, key: str, wanted: Check) -> Iterator[tuple[str, Any]]:
    """Place and value of those in the list under ``key`` that are as described; none where there is no such list."""
    entries = value.get(key) if isinstance(value, dict) else None
    for index, entry in enumerate(entries if isinstance(entries, list) else ()):
        if not wanted(entry):
            yield f"{key}[{index}]", entry


def _repeated(values: Sequence[Any], key: str, place: Callable[[int], str], separator: str) -> list[Problem]:
    """One problem for every text or number under ``key`` that an earlier object holds too."""
    first: dict[Any, int] = {}
    found = []
    for index, entry in enumerate(values):
        value = entry.get(key) if isinstance(entry, dict) else None
        if isinstance(value, (str, int)) and first.setdefault(value, index) != index:
            found.append((f"{place(index)}{separator}{key}", f"{show(value)} {TWICE} {place(first[value])}"))
    return found


def reason(problem: Problem) -> str:
    """A problem in short words to count by."""
    what = problem[1]
    if what == MISSING:
        return "missing key"
    if what.startswith(NEED):
        return "wrong value"
    return "duplicate" if TWICE in what else "does not fit"


def _join(outer: str, inner: str) -> str:
    return f"{outer}{inner}" if not inner or inner.startswith("[") else f"{outer}.{inner}"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e300


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON's escapes can also spell halves of a character."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def show(value: Any) -> str:
    """A value as JSON for a message: long texts cut, lists and objects by their size."""
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    return one_line(json.dumps(value, ensure_ascii=False), 60)
