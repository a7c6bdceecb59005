"""``mhmoe-vl score nlvr2``: accuracy and consistency of a file of lines ``identifier,prediction``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..data.nlvr2 import read_labels, truth_value
from ..data.records import Problem, read_text, show
from ..errors import DataError
from ..metrics.coverage import coverage_problems
from ..metrics.nlvr2 import score_nlvr2, sentence_key
from . import submission

HEAD = "identifier,prediction"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    submission.add_arguments(parser, predictions=f"CSV of lines {HEAD}, where prediction is True or False")
    about = "official JSON lines of the whole split; those without labels can be checked against only"
    parser.add_argument("--annotations", type=Path, required=True, metavar="A", help=about)


def run(arguments: argparse.Namespace) -> int:
    """Score the predictions; 2 when ``--check`` found something wrong with them."""
    labels = read_labels(arguments.annotations)
    rows, wrong = read_predictions(arguments.predictions)
    problems = submission.wrong_types(wrong, f"write {HEAD} in each line, such as dev-850-0-1,True")
    problems += coverage_problems([identifier for identifier, _ in rows], labels, "example")
    if not submission.accept(arguments, problems, len(labels)):
        return 2
    if None in labels.values():  # then all are
        if not arguments.check:
            raise DataError(f"{arguments.annotations}: no labels in it (score against a split with labels)")
        print(f"{arguments.annotations}: no labels in it, so nothing to score")
        return 0
    scores = score_nlvr2(dict(rows), labels)
    sentences = len(set(map(sentence_key, labels)))
    print(f"accuracy     {scores['accuracy']:.6f}  of {len(labels)} examples")
    print(f"consistency  {scores['consistency']:.6f}  of {sentences} sentences")
    submission.write_scores(arguments.json, scores)
    return 0


def read_predictions(path: Path) -> tuple[list[tuple[str, bool]], Sequence[Problem]]:
    """The lines of a submission as (identifier, prediction), and what is wrong with the others.

    A first line that reads ``identifier,prediction`` is passed over; names of booleans count in any case.

    Raises:
        DataError: the file cannot be read.
    """
    lines = read_text(path).splitlines()
    rows, wrong = [], []
    for number, line in enumerate(lines, 1):
        identifier, *rest = (part.strip() for part in line.split(","))
        prediction = truth_value(rest[0]) if len(rest) == 1 else None
        if identifier and prediction is not None:
            rows.append((identifier, prediction))
        elif (number, line.strip()) != (1, HEAD):
            wrong.append((f"line {number}", f"need identifier,True or identifier,False, got {show(line)}"))
    return rows, wrong
