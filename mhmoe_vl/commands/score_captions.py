"""``mhmoe-vl score captions``: BLEU, ROUGE-L and CIDEr of a COCO results file, and METEOR where Java is at hand."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..data.captions import read_references
from ..data.records import TEXT, WHOLE, fields, items, read_json
from ..errors import DataError
from ..metrics import caption_reference
from ..metrics.captions import score_captions
from ..metrics.coverage import coverage_problems
from ..metrics.ptb_tokenizer import tokenize
from . import submission

METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")
TOKENIZERS = {"own": "own (reads as PTBTokenizer 3.4.1)", "ptb": "Stanford PTBTokenizer (Java)"}
PREDICTION = fields({"image_id": WHOLE, "caption": TEXT})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    submission.add_arguments(parser, predictions='JSON list of {"image_id", "caption"}, one for each image')
    about = "captions in COCO's format, the whole split; a file without captions can be checked against only"
    parser.add_argument("--annotations", type=Path, required=True, metavar="A", help=about)
    about = "own: no Java; ptb: coco-caption's, and METEOR (pip install 'mhmoe-vl[caption-ref]')"
    parser.add_argument("--tokenizer", choices=list(TOKENIZERS), default="own", help=about)


def run(arguments: argparse.Namespace) -> int:
    """Score the predictions; 2 when ``--check`` found something wrong with them."""
    if arguments.tokenizer == "ptb":
        caption_reference.check_reference()
    references = read_references(arguments.annotations)
    predictions = read_json(arguments.predictions)
    if not submission.accept(arguments, find_problems(predictions, references), submission.one_each(len(references))):
        return 2
    bare = [image for image, captions in references.items() if not captions]
    if arguments.check and len(bare) == len(references):
        print(f"{arguments.annotations}: no captions in it, so nothing to score")
        return 0
    if bare:
        what = f"{len(bare)} of {len(references)} images without caption, first image {bare[0]}"
        raise DataError(f"{arguments.annotations}: annotations: {what} (score against a split with captions)")
    scores = score(references, {entry["image_id"]: entry["caption"] for entry in predictions}, arguments.tokenizer)
    print(_table(scores))
    submission.write_scores(arguments.json, scores)
    return 0


def find_problems(predictions: Any, images: Collection[int]) -> list[str]:
    """One line with a count for each kind of mistake: wrong types, then missing, extra and double images."""
    wrong = submission.wrong_types(items(PREDICTION)(predictions), 'write [{"image_id": 1, "caption": "a cat"}, ...]')
    if not isinstance(predictions, list):
        return wrong
    ids = [entry["image_id"] for entry in predictions if not fields({"image_id": WHOLE})(entry)]
    return [*wrong, *coverage_problems(ids, images, "image")]


def score(references: dict[int, list[str]], candidates: dict[int, str], tokenizer: str) -> dict[str, Any]:
    """The scores of texts: every name of ``METRICS`` (METEOR ``None`` without Java), counts, the tokenizer's name."""
    if tokenizer == "ptb":
        truth = caption_reference.ptb_tokenize(references)
        tokens = caption_reference.ptb_tokenize({image: [text] for image, text in candidates.items()})
        ours = {image: texts[0] for image, texts in tokens.items()}
    else:
        truth = {image: [tokenize(text) for text in texts] for image, texts in references.items()}
        ours = {image: tokenize(text) for image, text in candidates.items()}
    found: dict[str, Any] = dict(score_captions(truth, ours).corpus)
    found["METEOR"] = caption_reference.meteor(truth, ours) if tokenizer == "ptb" else None
    counts = {"images": len(references), "references": sum(map(len, references.values()))}
    return {name: found[name] for name in METRICS} | counts | {"tokenizer": tokenizer}


def _table(scores: dict[str, Any]) -> str:
    absent = f"not computed (needs Java and --tokenizer ptb; {caption_reference.PIP})"
    lines = [f"{name:<8}  {absent if scores[name] is None else format(scores[name], '.6f')}" for name in METRICS]
    counts = f"{scores['images']} images, {scores['references']} references"
    return "\n".join([*lines, f"{counts}, tokenizer: {TOKENIZERS[scores['tokenizer']]}"])
