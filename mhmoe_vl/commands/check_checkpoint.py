"""``mhmoe-vl check-checkpoint``: compare checkpoints with their checksums."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import CheckpointError, one_line
from ..train import checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or checkpoints in them")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Read every byte of the checkpoints; 1 when something is wrong."""
    folders = [folder for path in arguments.runs for folder in _checkpoints(path)]
    problems = [problem for folder in tqdm(folders, unit="checkpoint", disable=None) for problem in check(folder)]
    if arguments.json:
        print(json.dumps({"checkpoints": len(folders), "problems": problems}, ensure_ascii=False, indent=1))
    else:
        print("\n".join([*_rows(problems), f"{len(folders)} checkpoints, {len(problems)} problems"]))
    return 1 if problems else 0


def check(folder: Path) -> list[dict[str, str]]:
    """What is wrong with one checkpoint: file, tensor (empty where none can be named), reason and message."""
    problems = [
        {"file": str(file), "tensor": tensor, "reason": "checksum", "message": what}
        for file, tensor, what in checkpoint.find_damage(folder)
    ]
    if problems:
        return problems
    try:
        checkpoint.read(folder)
    except CheckpointError as error:
        return [{"file": str(folder), "tensor": "", "reason": "content", "message": one_line(error)}]
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


def _rows(problems: list[dict[str, Any]]) -> list[str]:
    rows = [[one_line(problem[key]) or "-" for key in ("file", "tensor", "reason", "message")] for problem in problems]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    return ["  ".join([*map(str.ljust, row, widths), row[3]]) for row in rows]
