"""``mhmoe-vl score``: the official metrics of a predictions file, one file of this folder for each."""

from __future__ import annotations

import argparse
from importlib import import_module
from types import ModuleType

METRICS = {
    "vqa": "VQA accuracy in percent: overall, by answer type, by question type",
    "captions": "BLEU, METEOR, ROUGE-L and CIDEr of captions",
    "nlvr2": "accuracy and consistency of NLVR2",
    "coco": "average precision of boxes or masks, COCO's twelve numbers",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The metrics, each with its own arguments."""
    subparsers = parser.add_subparsers(dest="metric", required=True, metavar="METRIC")
    for name, about in METRICS.items():
        _module(name).add_arguments(subparsers.add_parser(name, help=about, description=about))


def run(arguments: argparse.Namespace) -> int:
    """Score the predictions; 2 when ``--check`` found something wrong with them."""
    return _module(arguments.metric).run(arguments)


def _module(metric: str) -> ModuleType:
    return import_module(f".score_{metric}", __package__)
