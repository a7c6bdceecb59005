"""``mhmoe-vl check-checkpoint``: compare checkpoints with their checksums."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from ..errors import CheckpointError, one_line
from ..train import checkpoint
from .findings import Finding, aligned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or checkpoints in them")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Read every byte of the checkpoints; 1 when something is wrong."""
    folders = [folder for path in arguments.runs for folder in _checkpoints(path)]
    problems = [problem for folder in tqdm(folders, unit="checkpoint", disable=None) for problem in check(folder)]
    if arguments.json:
        report = {"checkpoints": len(folders), "problems": [asdict(problem) for problem in problems]}
        print(json.dumps(report, indent=1))
    else:
        rows = [(one_line(p.file), one_line(p.place) or "-", p.reason, one_line(p.message)) for p in problems]
        print("\n".join([*aligned(rows), f"{len(folders)} checkpoints, {len(problems)} problems"]))
    return 1 if problems else 0


def check(folder: Path) -> list[Finding]:
    """What is wrong with one checkpoint, by file and tensor."""
    found = checkpoint.find_damage(folder)
    problems = [Finding(str(file), tensor, "checksum", what) for file, tensor, what in found]
    if problems:
        return problems
    try:
        checkpoint.read(folder)
    except CheckpointError as error:
        return [Finding(str(folder), "", "content", str(error))]
    return []


def _checkpoints(path: Path) -> list[Path]:
    """``path`` itself, or the checkpoints of the run folder that it is.

    Raises:
        CheckpointError: it is neither.
    """
    if any((path / name).exists() for name in ("state.json", "model.safetensors", "COMPLETE")):
        return [path]
    found = sorted(folder for folder in (path / "checkpoints").glob("*") if folder.is_dir())
    if not found:
        raise CheckpointError(f"{path}: no checkpoint there (name a run folder or one of its checkpoints)")
    return found
