"""Promise 13: files of every released version load, and those of a later one are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from toy_task import ToyTask, toy_config, train

from mhmoe_vl import config
from mhmoe_vl.checks import CHECKPOINT_FORMAT
from mhmoe_vl.data.manifest import manifest_path
from mhmoe_vl.data.shards import ShardSet
from mhmoe_vl.data.transforms import decode_image
from mhmoe_vl.errors import MhmoeError
from mhmoe_vl.train import checkpoint, optim

from .bit_rot import command
from .harness import TESTS, Found

TITLE = "old files"
GOLDEN = TESTS / "golden"
MOST_BYTES = 1_000_000


def check(folder: Path, full: bool) -> Found:
    found = Found("")
    versions = sorted(path for path in GOLDEN.iterdir() if path.is_dir())
    for version in versions:
        copy = folder / version.name
        shutil.copytree(version, copy)
        for part in (_checkpoint, _shard, _config):
            try:
                part(copy)
            except (AssertionError, MhmoeError) as error:
                found.failures.append(f"{version.name}, {part.__name__.strip('_')}: {error}")
    refused = [refuse(folder, found) for refuse in (_newer_checkpoint, _newer_manifest, _newer_config)]
    size = sum(path.stat().st_size for version in versions for path in version.rglob("*") if path.is_file())
    if size > MOST_BYTES * len(versions):
        found.failures.append(f"{size:,} bytes of golden files")
    names = ", ".join(version.name for version in versions)
    found.figure = (
        f"checkpoint, shard with manifest, and configuration of {names} ({size // 1000} kB) load and go on;"
        f" {sum(refused)} of {len(refused)} files of a later version refused by name"
    )
    found.numbers = {"versions": [version.name for version in versions], "bytes": size}
    return found


def _checkpoint(folder: Path) -> None:
    """Verifies, fills model, moving average and optimizer, and trains on."""
    last = folder / "run" / "checkpoints" / "last"
    code, report = command("check-checkpoint", last)
    assert code == 0, report
    saved = checkpoint.read(last)
    assert saved.state["step"] == 4
    task = ToyTask(dropout=0.3)
    for part in ("model", "ema"):
        checkpoint.load_weights(task.model(None), saved.tensors[part], last)
    model = task.model(None)
    optimizer = optim.build_optimizer(model, toy_config(folder).optim)
    optim.load_optimizer_tensors(model, optimizer, saved.tensors["optimizer"])
    assert torch.equal(optimizer.state[model.experts]["exp_avg"], saved.tensors["optimizer"]["experts:exp_avg"])
    assert train(folder / "run", {"dropout": 0.3}, train__steps=6, train__ema_decay=0.5) == 0
    assert checkpoint.read(last).state["step"] == 6


def _shard(folder: Path) -> None:
    samples = ShardSet([str(folder / "a.tar")])
    assert [sample.key for sample in samples] == ["000", "001", "002"]
    assert all(decode_image(sample.image()).shape == (3, 32, 32) for sample in samples)
    assert all("half beside a" in sample.text() for sample in samples)


def _config(folder: Path) -> None:
    settings = config.load(config.run_config("masked_modeling"), [folder / "config.yaml"])
    assert settings.encoder is not None and settings.task.kind == "masked_modeling"


# ----------------------------------------------------------------------------------------------- refusals
def _refused(found: Found, name: str, words: str, use) -> bool:
    try:
        use()
    except MhmoeError as error:
        if words in str(error) and len(str(error)) <= 300:
            return True
        found.failures.append(f"{name}: {error}")
    else:
        found.failures.append(f"{name}: accepted")
    return False


def _newer_checkpoint(folder: Path, found: Found) -> bool:
    state = {"step": 1, "format": CHECKPOINT_FORMAT + 1, "package": "9.9.9"}
    last = checkpoint.save(folder / "newer", {"model": {"w": torch.ones(2)}}, state, "")
    return _refused(found, "checkpoint", "made by mhmoe_vl 9.9.9", lambda: checkpoint.read(last))


def _newer_manifest(folder: Path, found: Found) -> bool:
    shard = folder / "newer.tar"
    shutil.copy(next(GOLDEN.glob("*/a.tar")), shard)
    document = json.loads(next(GOLDEN.glob("*/a.manifest.json")).read_text()) | {"version": 99}
    manifest_path(shard).write_text(json.dumps(document))
    return _refused(found, "manifest", "manifest version 99", lambda: ShardSet([str(shard)]))


def _newer_config(folder: Path, found: Found) -> bool:
    """A key of a later version is unknown here, and is named."""
    path = folder / "newer.yaml"
    path.write_text(next(GOLDEN.glob("*/config.yaml")).read_text() + "later_option: 1\n")
    load = lambda: config.load(config.run_config("masked_modeling"), [path])  # noqa: E731
    return _refused(found, "configuration", "later_option", load)
