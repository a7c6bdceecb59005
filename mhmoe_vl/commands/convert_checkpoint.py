"""``mhmoe-vl convert-checkpoint``: the tensors of a ``torch.save`` file as safetensors."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from ..errors import CheckpointError, one_line
from ..models.convert_vqkd import read_weights
from ..train.checkpoint import not_finite, separate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="torch.save files (.pth, .pt, .bin)")
    parser.add_argument("--out", type=Path, help="file to write, for one FILE (default: FILE with .safetensors)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Convert the files, names kept; 1 when a tensor holds NaN or infinity (it is converted all the same)."""
    if arguments.out is not None and len(arguments.files) > 1:
        raise CheckpointError(f"--out: {arguments.out} for {len(arguments.files)} files (convert one at a time)")
    reports = []
    for file in tqdm(arguments.files, unit="file", disable=None):
        reports.append(convert(file, arguments.out or file.with_suffix(".safetensors")))
    if arguments.json:
        print(json.dumps(reports, indent=1))
    else:
        print("\n".join(line for report in reports for line in _lines(report)))
    return 1 if any(report["not_finite"] for report in reports) else 0


def convert(file: Path, out: Path) -> dict:
    """Write the tensors of ``file`` to ``out``, whole or not at all; what was written, and what looks wrong.

    Raises:
        CheckpointError: ``file`` is missing or holds anything but tensors by name; ``out`` exists or cannot be written.
    """
    if out.exists():
        raise CheckpointError(f"{out}: exists already (remove it, or name another --out)")
    weights = separate(read_weights(file))
    part = out.with_name(out.name + ".part")
    try:
        save_file(weights, part)
        os.replace(part, out)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"{out}: cannot be written: {one_line(error, 150)} (name another --out)") from error
    numbers = sum(value.numel() for value in weights.values())
    report = {"file": str(file), "out": str(out), "tensors": len(weights), "numbers": numbers}
    return report | {"not_finite": list(not_finite(weights))}


def _lines(report: dict) -> list[str]:
    bad = [f"{one_line(report['file'])}  {one_line(name)}  not finite" for name in report["not_finite"]]
    return [*bad, f"{one_line(report['out'])}: {report['tensors']} tensors, {report['numbers']:,} numbers"]
