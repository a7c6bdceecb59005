"""Tiny pre-training runs in forked children: the same command line as ``tools/pretrain.py``."""

from __future__ import annotations

from pathlib import Path

from tiny_world import settings, write_settings, write_world
from toy_task import metrics

import mhmoe_vl.analysis.report
import mhmoe_vl.analysis.summary
import mhmoe_vl.train.engine  # noqa: F401 (children are forked after all imports)
from mhmoe_vl import cli
from mhmoe_vl.data.text import create_text_tokenizer

create_text_tokenizer("bpe")

IMAGES_ONLY = {
    "encoder": {"modalities": ["image"], "drop_path": 0.2},
    "task": {"texts": None, "pairs": None},
}
"""pictures alone, so that a checkpoint is small and a step takes milliseconds"""


def world(folder: Path) -> Path:
    """The tiny world below ``folder``, made when missing."""
    if not (folder / "world").is_dir():
        write_world(folder / "world")
    return folder / "world"


def write_run(folder: Path, name: str, *, images_only: bool = True, **train) -> Path:
    """The configuration file of a run below ``folder`` that goes to ``folder/name``."""
    values = settings(world(folder), folder / name, **(IMAGES_ONLY if images_only else {}))
    values["train"] |= {"save_every": 2, "eval_every": 4, "steps": 12} | train
    return write_settings(folder / f"{name}.yaml", values)


def pretrain(*arguments: object) -> int:
    """The exit code of ``tools/pretrain.py`` with ``arguments``, run in this process."""
    try:
        cli.run("masked_modeling", "none.yaml", "about", [str(a) for a in arguments])
    except SystemExit as ended:
        return ended.code


def losses(run_dir: Path) -> list[dict]:
    """Lines of the log without what may differ between equal runs; none where a run was stopped in its first step."""
    return metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
