"""Tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, columns aligned; the first row is the header."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    header, *body = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    lines = [header, ["-" * width for width in widths], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
