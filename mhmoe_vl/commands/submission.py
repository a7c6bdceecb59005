"""What the ``score`` commands share: a predictions file held against its split, and the file of scores."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.manifest import write_text
from ..data.records import Problem
from ..errors import DataError, one_line


def add_arguments(parser: argparse.ArgumentParser, *, predictions: str) -> None:
    """The arguments that all metrics have; ``predictions`` says what the file of predictions looks like."""
    parser.add_argument("--predictions", type=Path, required=True, metavar="P", help=predictions)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the scores to this file")
    about = "first list all that is wrong with the predictions, one line with a count for each kind"
    parser.add_argument("--check", action="store_true", help=about)


def wrong_types(problems: Sequence[Problem], remedy: str) -> list[str]:
    """One line for all values that are missing or of the wrong type, naming the first; empty when there are none."""
    if not problems:
        return []
    first = ": ".join(filter(None, problems[0]))
    return [f"{len(problems)} values missing or of a wrong type, first {first} ({remedy})"]


def accept(arguments: argparse.Namespace, problems: Sequence[str], count: int) -> bool:
    """Whether the predictions can be scored; with ``--check``, what was found is printed, one line each.

    Args:
        arguments: of the command.
        problems: what is wrong, each on a line without the file's name.
        count: how many predictions there are.

    Raises:
        DataError: they cannot, and ``--check`` was not asked for.
    """
    if problems and not arguments.check:
        raise DataError(f"{arguments.predictions}: {'; '.join(problems)}")
    for problem in problems:
        print(one_line(f"error: {arguments.predictions}: {problem}"), file=sys.stderr)
    if arguments.check and not problems:
        print(f"{arguments.predictions}: {count} predictions, one for each of the split")
    return not problems


def write_scores(path: Path | None, scores: Any) -> None:
    """Write scores as JSON, whole or not at all; nothing without a path.

    Raises:
        DataError: the file cannot be written.
    """
    if path is None:
        return
    try:
        write_text(path, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror} (name another file)") from error
