"""What checks find: one entry for everything that is wrong, counts, and both as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import one_line


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        file: shard, annotation file, or file of a checkpoint.
        place: member of the shard, entry or line of the file, or tensor; empty for all of it.
        reason: short words to count by.
        message: what is wrong.
    """

    file: str
    place: str
    reason: str
    message: str


@dataclass(frozen=True)
class AnnotationFile:
    """An annotation file that was checked.

    Attributes:
        file: its path.
        kind: what it was taken for; empty where nothing fitted.
        entries: questions, images, lines or rows that could be read of it.
        pictures: those that it names and that were looked at; none where no folders were given.
    """

    file: str
    kind: str
    entries: int
    pictures: int | None


@dataclass
class Report:
    """What a check found, in shards and in annotation files."""

    shards: int = 0
    samples: int = 0
    without_manifest: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    files: list[AnnotationFile] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain values, with the number of problems by reason."""
        return asdict(self) | {"reasons": dict(Counter(problem.reason for problem in self.problems))}

    def table(self) -> str:
        """A line per problem (file, place, reason, what), one per annotation file, and the counts."""
        rows = [(one_line(p.file), one_line(p.place) or "-", p.reason, one_line(p.message)) for p in self.problems]
        lines = aligned(rows)
        lines += aligned([(one_line(f.file), f.kind or "not known", _size(f)) for f in self.files])
        counts = [f"{self.shards} shards, {self.samples} samples"] if self.shards else []
        counts += [f"{len(self.files)} annotation files"] if self.files else []
        counts = [", ".join([*counts, f"{len(rows)} problems"])]
        counts += [f"{count} {reason}" for reason, count in Counter(p.reason for p in self.problems).most_common()]
        if self.without_manifest:
            counts.append(f"{self.without_manifest} without manifest (members not checked)")
        counts += [f"{count} members left out ({reason})" for reason, count in sorted(self.left_out.items())]
        return "\n".join([*lines, "; ".join(counts)])


def _size(file: AnnotationFile) -> str:
    if file.pictures is None:
        return f"{file.entries} entries, pictures not checked (no --images)"
    return f"{file.entries} entries, {file.pictures} pictures"


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of texts as lines, all but the last column padded."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    return ["  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows]
