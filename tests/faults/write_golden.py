"""Writes ``tests/golden/<version>``: a checkpoint, a shard with its manifest, and a configuration of this version.

Run once when a version is released (``PYTHONPATH=tests python -m faults.write_golden``) and never changed
afterwards: later versions must read them, which ``old_files.py`` tests.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import toy_task
from tiny_world import sample

import mhmoe_vl
from mhmoe_vl import config
from mhmoe_vl.data.writing import write_shard

from .old_files import GOLDEN


def main() -> None:
    """Write the files; refuses to replace those of a version that has them."""
    folder = GOLDEN / mhmoe_vl.__version__
    folder.mkdir()
    settings = config.load(config.run_config("masked_modeling"), ["configs/pretrain/scenes_tiny.yaml"])
    os.chdir(folder)
    toy_task.train(Path("run"), {"dropout": 0.3}, train__steps=4, train__ema_decay=0.5)
    for name in (".lock", "checkpoints/best", "metrics.jsonl", "predictions"):
        path = folder / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    rng = np.random.default_rng(0)
    made = [sample(rng) for _ in range(3)]
    write_shard(folder / "a.tar", [(f"{i:03d}", {"png": png, "txt": text}) for i, (png, text) in enumerate(made)])
    (folder / "config.yaml").write_text(config.dump(settings))


if __name__ == "__main__":
    main()
