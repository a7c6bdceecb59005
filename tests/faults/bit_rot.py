"""Promise 5: one flipped bit is found and named, never trained on, and a run resumes from the checkpoint before."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import time
from pathlib import Path

import torch

from mhmoe_vl import commands
from mhmoe_vl.data.manifest import read_manifest
from mhmoe_vl.data.sample import BadSample
from mhmoe_vl.data.shards import ShardSet
from mhmoe_vl.data.tar import BLOCK
from mhmoe_vl.data.writing import write_shard
from mhmoe_vl.train import checkpoint

from .damaged_shards import write
from .harness import Found, fork, wait
from .runs import pretrain, write_run

TITLE = "bit rot"
SECONDS_PER_GB = 3.0


def command(*arguments: object) -> tuple[int, dict]:
    """Exit code and report of ``mhmoe-vl ARGUMENTS --json``."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = commands.main([*map(str, arguments), "--json"])
    return code, json.loads(out.getvalue())


@contextlib.contextmanager
def flipped(path: Path, draw: random.Random):
    """One bit of a file, changed and put back; gives the byte's position."""
    data = path.read_bytes()
    at = draw.randrange(len(data))
    path.write_bytes(data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :])
    try:
        yield at
    finally:
        path.write_bytes(data)


def check(folder: Path, full: bool) -> Found:
    found, draw = Found(""), random.Random(0)
    count = 1000 if full else 60
    named = _checkpoints(folder, count, draw, found)
    in_shards = _shards(folder, count, draw, found)
    fell_back = _resume(folder, 10 if full else 1, draw, found)
    speed = _speed(folder, 2**28 if full else 2**26)
    for name, seconds in speed.items():
        if full and seconds > SECONDS_PER_GB:  # the quick part runs beside other tests
            found.failures.append(f"verifying a {name} takes {seconds:.1f} s a GB")
    found.figure = (
        f"{count} flips in checkpoints and {count} in shards: all found, file named ({named} tensors and {in_shards}"
        f" members too), 0 damaged bytes delivered; {fell_back} resumes fell back and said so; verified in"
        f" {speed['checkpoint']:.1f} and {speed['shard']:.1f} s a GB"
    )
    found.numbers = {"flips": 2 * count, "tensors": named, "members": in_shards, "fell_back": fell_back, **speed}
    return found


def _checkpoints(folder: Path, count: int, draw: random.Random, found: Found) -> int:
    """Flips in every file of a checkpoint, by size; how many tensors were named."""
    torch.manual_seed(0)
    parts = {"model": {f"w{i}": torch.randn(40 + i) for i in range(9)}, "optimizer": {"w0:step": torch.tensor(2.0)}}
    last = checkpoint.save(folder / "checkpoints", parts, {"step": 1}, "seed: 0\n")
    files = sorted(last.iterdir())
    sizes = [file.stat().st_size for file in files]
    named = 0
    for _ in range(count):
        [file] = draw.choices(files, sizes)
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little") if file.suffix == ".safetensors" else None
        with flipped(file, draw) as at:
            code, report = command("check-checkpoint", last)
        problems = report["problems"]
        seal = {str(last / "checksums.json"), str(last / "COMPLETE")}
        right_file = any(p["file"] == str(file) or {p["file"], str(file)} <= seal for p in problems)
        in_tensor = header is not None and at >= header
        if code != 1 or not right_file or (in_tensor and not problems[0]["place"]):
            found.failures.append(f"{file.name} byte {at}: code {code}, {problems[:2]}")
        named += bool(problems and problems[0]["place"])
    return named


def _shards(folder: Path, count: int, draw: random.Random, found: Found) -> int:
    """Flips anywhere in a shard; how many members were named. Delivered samples must be the ones that were written."""
    path = folder / "a.tar"
    samples = write(path, draw)
    places = {
        f"{key}.{extension}": (offset, size)
        for key, members in read_manifest(path).samples.items()
        for extension, (offset, size, _) in members.items()
    }
    named = 0
    for _ in range(count):
        with flipped(path, draw) as at:
            code, report = command("check-data", path)
            for number in range(len(samples)):
                with contextlib.suppress(BadSample):
                    sample = ShardSet([str(path)])[number]
                    if sample.members != samples[sample.key]:
                        found.failures.append(f"byte {at}: sample {sample.key} delivered damaged")
        expected = [name for name, (offset, size) in places.items() if offset - BLOCK <= at < offset + size]
        told = {problem["place"] for problem in report["problems"]}
        if code != 1 or any(p["file"] != str(path) for p in report["problems"]) or not told >= set(expected):
            found.failures.append(f"byte {at}: code {code}, expected {expected}, told {sorted(told)}")
        named += bool(expected)
    return named


def _resume(folder: Path, count: int, draw: random.Random, found: Found) -> int:
    """Runs whose newest checkpoint has a flipped bit: they must go on from the one before, and say so."""
    file = write_run(folder, "run", save_every=2, steps=4, eval_every=0)
    if wait(fork(lambda: pretrain("--config", file), folder / "said.txt"), 120) != 0:
        found.failures.append(f"run: {(folder / 'said.txt').read_text()[-300:]}")
    fell_back = 0
    for number in range(count):
        shutil.copytree(folder / "run", folder / "rotten")
        said = folder / f"said-{number}.txt"
        target = draw.choice(sorted((folder / "rotten/checkpoints/last").glob("*.safetensors")))
        for name in ("best", "step-00000004"):
            shutil.rmtree(folder / "rotten/checkpoints" / name, ignore_errors=True)
        with flipped(target, draw):
            code = wait(fork(lambda: pretrain("--config", file, "--output_dir", folder / "rotten"), said), 120)
            text = said.read_text()
        right = code == 0 and f"warning: {target}" in text and "checkpoints/previous, step 2" in text
        fell_back += right
        if not right:
            found.failures.append(f"resume {number}: code {code}: {text[-300:]}")
        shutil.rmtree(folder / "rotten")
    return fell_back


def _speed(folder: Path, size: int) -> dict[str, float]:
    """Seconds that verification takes for a GB."""
    parts = {"model": {"w": torch.zeros(size // 4)}}
    last = checkpoint.save(folder / "large", parts, {"step": 1}, "")
    write_shard(folder / "large.tar", ((f"{i:04d}", {"jpg": bytes(2**24)}) for i in range(size // 2**24)))
    seconds = {}
    for name, action in {
        "checkpoint": lambda: checkpoint.verify(last),
        "shard": lambda: command("check-data", folder / "large.tar"),
    }.items():
        began = time.process_time()
        action()
        seconds[name] = (time.process_time() - began) * 1e9 / size
    shutil.rmtree(folder / "large")
    (folder / "large.tar").unlink()
    return seconds
