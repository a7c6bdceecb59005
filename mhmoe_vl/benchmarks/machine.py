"""The machine of a run: threads, device, types worth measuring, and what the JSON says of it all."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..distributed import select_device
from ..errors import ConfigError
from ..train.system import raise_malloc_thresholds, uses_bfloat16
from .ceilings import in_words, measure_ceilings
from .processor import cpu_name
from .timing import Clock, make_clock


def add_options(parser: argparse.ArgumentParser, json_path: str) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of each contender (%(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: all cores)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="%(default)s")
    parser.add_argument("--json", type=Path, default=Path(json_path), help="results (%(default)s)")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked."""
    options = parser.parse_args(argv)
    for name in ("rounds", "threads"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name}: {value} is below 1")
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu: counts threads that wait as well (add --threads 1)")
    return options


def prepare(options: argparse.Namespace) -> torch.device:
    """Heap and threads as the training tools have them.

    Raises:
        ConfigError: the device is not there.
    """
    raise_malloc_thresholds()
    if options.threads:
        torch.set_num_threads(options.threads)
    return select_device(options.device)


def clock_of(options: argparse.Namespace, device: torch.device) -> Clock:
    """The clock that ``--clock`` names."""
    return make_clock(options.clock, device)


def native_types(device: torch.device) -> list[str]:
    """What is worth measuring: on a CPU float32, and bfloat16 where ``train.precision: auto`` would take it; on an
    accelerator bfloat16 alone."""
    bfloat16 = ["bfloat16"] if uses_bfloat16("auto", device) else []
    return bfloat16 if bfloat16 and device.type != "cpu" else ["float32", *bfloat16]


def describe(options: argparse.Namespace, device: torch.device, tool: str) -> dict[str, Any]:
    """What a reader of the numbers must know."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    ceilings = {"ceilings": measure_ceilings(device)} if device.type == "cuda" else {}
    return ceilings | {
        "tool": tool,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores" + (f", {gpu}" if gpu else ""),
        "amx_bf16": bool(capabilities.get("amx_bf16")),
        "device": device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "clock": options.clock,
        "rounds": options.rounds,
        "load_before": load_average(),
    }


def load_average() -> float:
    """Processes that wanted to run over the last minute."""
    return round(os.getloadavg()[0], 2)


def save(path: Path, results: dict[str, Any]) -> None:
    """Write the results, and the machine's load at the end.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results | {"load_after": load_average()}, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--json: {path}: {error.strerror} (name a file you may write)") from error


def heading(results: dict[str, Any]) -> str:
    """The machine in a line."""
    threads = f"{results['threads']} thread{'s' * (results['threads'] > 1)}"
    clock = "processor time" if results["clock"] == "cpu" else "wall time"
    load = f"load {results['load_before']} at the start"
    line = f"{results['hardware']}, torch {results['torch']}, {threads}, {clock}, {results['date']}, {load}"
    return line + (f"; {in_words(results['ceilings'])}" if "ceilings" in results else "")
