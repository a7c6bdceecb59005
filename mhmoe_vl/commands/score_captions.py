"""``mhmoe-vl score captions``: BLEU, ROUGE-L and CIDEr of a COCO results file, and METEOR where Java is at hand."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..data.records import TEXT, WHOLE, check, fields, items, read_json
from ..errors import DataError, one_line
from ..metrics import caption_reference
from ..metrics.captions import score_captions
from ..metrics.ptb_tokenizer import tokenize

METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")
TOKENIZERS = {"own": "own (reads as PTBTokenizer 3.4.1)", "ptb": "Stanford PTBTokenizer (Java)"}
PREDICTION = fields({"image_id": WHOLE, "caption": TEXT})
ANNOTATIONS = items(fields({"id": WHOLE, "image_id": WHOLE, "caption": TEXT}), unique="id")
SPLIT = fields({"images": items(fields({"id": WHOLE}), unique="id")}, {"annotations": ANNOTATIONS})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    parser.add_argument("--predictions", type=Path, required=True, help='JSON list of {"image_id", "caption"}')
    parser.add_argument("--annotations", type=Path, required=True, help="captions in COCO's format, the whole split")
    about = "own: no Java; ptb: coco-caption's, and METEOR (pip install 'mhmoe-vl[caption-ref]')"
    parser.add_argument("--tokenizer", choices=list(TOKENIZERS), default="own", help=about)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the scores to this file")
    parser.add_argument("--check", action="store_true", help="first list all that is wrong with the predictions")


def run(arguments: argparse.Namespace) -> int:
    """Score the predictions; 2 when ``--check`` found something wrong with them."""
    if arguments.tokenizer == "ptb":
        caption_reference.check_reference()
    references = read_references(arguments.annotations)
    predictions = read_json(arguments.predictions)
    problems = list(find_problems(arguments.predictions, predictions, references))
    if arguments.check and not _report(arguments, problems, references):
        return 2 if problems else 0
    if problems:
        raise DataError(problems[0])
    if bare := [image for image, captions in references.items() if not captions]:
        what = f"{len(bare)} of {len(references)} images without caption, first image {bare[0]}"
        raise DataError(f"{arguments.annotations}: annotations: {what} (score against a split with captions)")
    scores = score(references, {entry["image_id"]: entry["caption"] for entry in predictions}, arguments.tokenizer)
    print(_table(scores))
    if arguments.json is not None:
        _write(arguments.json, scores)
    return 0


def _report(arguments: argparse.Namespace, problems: list[str], references: dict[int, list[str]]) -> bool:
    """Print what ``--check`` found; whether there is something to score."""
    for problem in problems:
        print(f"error: {one_line(problem)}", file=sys.stderr)
    if problems:
        return False
    print(f"{arguments.predictions}: {len(references)} captions, one for each image")
    if any(references.values()):
        return True
    print(f"{arguments.annotations}: no captions in it, so nothing to score")
    return False


def read_references(path: Path) -> dict[int, list[str]]:
    """The captions of every image by its id; all empty for a test split, whose file has no ``annotations``.

    Raises:
        DataError: the file is not a COCO captions file, an id is given twice, or a caption is of an unknown image.
    """
    data = read_json(path)
    check(path, data, SPLIT)
    references: dict[int, list[str]] = {image["id"]: [] for image in data["images"]}
    if not references:
        raise DataError(f"{path}: images: none (name the captions of a whole split)")
    for number, annotation in enumerate(data.get("annotations", [])):
        image_id = annotation["image_id"]
        if image_id not in references:
            raise DataError(f"{path}: annotations[{number}].image_id: {image_id} is not in images (mend the file)")
        references[image_id].append(annotation["caption"])
    return references


def find_problems(path: Path, predictions: Any, images: Collection[int]) -> Iterator[str]:
    """One line for each kind of mistake: wrong types, double ids, ids that are not in the split, missing ones."""
    if wrong := items(PREDICTION)(predictions):
        place, what = wrong[0]
        count = f"{len(wrong)} values missing or of the wrong type, first: {what}"
        remedy = 'write [{"image_id": 1, "caption": "a cat"}, ...]'
        yield f"{': '.join(filter(None, [str(path), place]))}: {count} ({remedy})"
    if not isinstance(predictions, list):
        return
    places = {number: entry["image_id"] for number, entry in enumerate(predictions) if not PREDICTION(entry)}
    times, known = Counter(places.values()), set(images)
    if double := [number for number, image in places.items() if times[image] > 1]:
        count = f"{len({places[number] for number in double})} image ids given twice or more"
        yield f"{path}: [{double[0]}].image_id: {count}, first {places[double[0]]} (keep one caption for each image)"
    if extra := [number for number, image in places.items() if image not in known]:
        count = f"{len({places[number] for number in extra})} image ids not among the {len(known)} of the split"
        yield f"{path}: [{extra[0]}].image_id: {count}, first {places[extra[0]]} (leave them out)"
    if missing := [image for image in images if image not in times]:
        count = f"{len(missing)} of {len(known)} images without caption, first image {missing[0]}"
        yield f"{path}: {count} (caption the whole split)"


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


def _write(path: Path, scores: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror} (name another file)") from error
