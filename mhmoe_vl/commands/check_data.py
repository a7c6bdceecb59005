"""``mhmoe-vl check-data``: what is wrong with shards, and with annotation files and their pictures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..data.kinds import KINDS
from ..data.remote import is_url
from ..data.shards import expand_shards
from .check_annotations import check_annotations
from .check_shards import check_shards
from .findings import Report

ANNOTATIONS = (".json", ".jsonl", ".txt", ".csv")
"""How the names of annotation files end, gzipped or not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    about = "shards (tar files, folders, patterns, http(s) addresses) and annotation files (json, jsonl, txt, csv; .gz)"
    parser.add_argument("places", nargs="+", metavar="PLACE", help=about)
    kinds = "; ".join(f"{name}: {kind.about}" for name, kind in KINDS.items())
    about = f"take every place for an annotation file of this kind, instead of knowing it by its content ({kinds})"
    parser.add_argument("--kind", choices=list(KINDS), help=about)
    about = "folders of the pictures that annotations name: each picture is looked for and decoded"
    parser.add_argument("--images", nargs="+", type=Path, default=[], metavar="FOLDER", help=about)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Read every byte of the shards, every entry of the files and every picture; 1 when something is wrong."""
    files = [place for place in arguments.places if arguments.kind or _is_annotations(place)]
    shards = [place for place in arguments.places if place not in files]
    report = Report()
    if shards:
        check_shards(expand_shards(shards), report)
    if files:
        check_annotations(list(map(Path, files)), arguments.kind, arguments.images, report)
    print(json.dumps(report.to_dict(), indent=1) if arguments.json else report.table())
    return 1 if report.problems else 0


def _is_annotations(place: str) -> bool:
    return not is_url(place) and place.lower().removesuffix(".gz").endswith(ANNOTATIONS)
