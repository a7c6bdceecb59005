"""``mhmoe-vl score vqa``: official VQA accuracy of an EvalAI results file."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data.records import TEXT, WHOLE, fields, items, read_json
from ..data.vqa import read_annotations, read_question_ids, require_same_questions
from ..errors import ConfigError, one_line
from ..metrics.coverage import coverage_problems
from ..metrics.vqa_accuracy import VQAScores, score_vqa
from . import submission

PREDICTION = fields({"question_id": WHOLE, "answer": TEXT})
NUM_ANNOTATORS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    submission.add_arguments(parser, predictions='JSON list of {"question_id", "answer"}, one for each question')
    about = "official annotations of the whole split; without them (test splits), --questions can be checked against"
    parser.add_argument("--annotations", type=Path, metavar="A", help=about)
    parser.add_argument("--questions", type=Path, metavar="Q", help="official questions of the split")


def run(arguments: argparse.Namespace) -> int:
    """Score the predictions; 2 when ``--check`` found something wrong with them."""
    if arguments.annotations is None and not (arguments.check and arguments.questions):
        raise ConfigError("score vqa: no --annotations (give them, or --check and the --questions of a test split)")
    annotations = None if arguments.annotations is None else read_annotations(arguments.annotations)
    split = read_split(arguments.questions, arguments.annotations, annotations)
    predictions = read_json(arguments.predictions)
    if not submission.accept(arguments, find_problems(predictions, split), submission.one_each(len(split))):
        return 2
    if annotations is None:
        print(f"{arguments.questions}: questions only, so nothing to score")
        return 0
    scores = score_vqa({entry["question_id"]: entry["answer"] for entry in predictions}, annotations)
    print(_table(scores, annotations))
    submission.write_scores(arguments.json, asdict(scores))
    return 0


def read_split(questions: Path | None, path: Path | None, annotations: list[dict[str, Any]] | None) -> list[int]:
    """The question ids of the split: those of the questions file, where there is one.

    Raises:
        DataError: the questions file is not one, or has other questions than the annotations (read from ``path``).
    """
    annotated = [annotation["question_id"] for annotation in annotations or []]
    if questions is None:
        return annotated
    split = read_question_ids(questions)
    if path is not None:
        require_same_questions(questions, split, path, annotated)
    return split


def find_problems(predictions: Any, split: list[int]) -> list[str]:
    """One line with a count for each kind of mistake: wrong types, then missing, extra and double questions."""
    wrong = submission.wrong_types(items(PREDICTION)(predictions), 'write [{"question_id": 1, "answer": "yes"}, ...]')
    if not isinstance(predictions, list):
        return wrong
    ids = [entry["question_id"] for entry in predictions if not fields({"question_id": WHOLE})(entry)]
    return [*wrong, *coverage_problems(ids, split, "question")]


def _table(scores: VQAScores, annotations: list[dict[str, Any]]) -> str:
    """Accuracies in percent to two digits, as the official code rounds them, with the number of questions of each."""
    rows = [("overall", scores.overall, len(annotations))]
    for kind, means in (("answer_type", scores.per_answer_type), ("question_type", scores.per_question_type)):
        counts = Counter(annotation[kind] for annotation in annotations)
        rows += [("", None, None)] + [(one_line(name, 40) or "-", mean, counts[name]) for name, mean in means.items()]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'':<{width}}  accuracy  questions"]
    lines += [f"{name:<{width}}  {mean:8.2f}  {count:9}" if name else "" for name, mean, count in rows]
    if odd := sum(len(annotation["answers"]) != NUM_ANNOTATORS for annotation in annotations):
        lines.append(f"{odd} questions with other than {NUM_ANNOTATORS} answers")
    return "\n".join(lines)
