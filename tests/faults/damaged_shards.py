"""Promise 2: of a damaged shard every intact sample is delivered, no damaged one is, and the rest is counted."""

from __future__ import annotations

import random
import signal
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from mhmoe_vl.data.loader import StepDataset, open_shards
from mhmoe_vl.data.manifest import manifest_path, read_manifest
from mhmoe_vl.data.sample import BadSample, Sample
from mhmoe_vl.data.shards import ShardSet, stream_samples
from mhmoe_vl.data.writing import write_shard
from mhmoe_vl.errors import DataError

from .harness import Found

TITLE = "damaged shards"
SAMPLES, BLOCK = 20, tarfile.BLOCKSIZE


def flip_bit(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def zero_block(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data) // BLOCK) * BLOCK
    data[at : at + BLOCK] = bytes(BLOCK)


def lose_block(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data) // BLOCK) * BLOCK
    del data[at : at + BLOCK]


def cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def cut_at_block(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data) // BLOCK) * BLOCK :]


def overwrite(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data))
    garbage = draw.randbytes(draw.choice([1, 64, 700, 5000]))
    data[at : at + len(garbage)] = garbage


def insert(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data))
    data[at:at] = draw.randbytes(draw.choice([1, 512, 3000]))


def swap_members(data: bytearray, draw: random.Random) -> None:
    """Exchange two runs of whole blocks, as of members that a broken writer put in the wrong place."""
    blocks = draw.randrange(1, 5)
    first, second = sorted(draw.sample(range(len(data) // BLOCK - blocks), 2))
    if second - first >= blocks:
        one = slice(first * BLOCK, (first + blocks) * BLOCK)
        other = slice(second * BLOCK, (second + blocks) * BLOCK)
        data[one], data[other] = data[other], data[one]


def replace_by_page(data: bytearray, draw: random.Random) -> None:
    data[:] = b"<html><body>404 not found</body></html>\n" * draw.randrange(3)


DAMAGE: list[Callable[[bytearray, random.Random], None]] = [
    flip_bit, zero_block, lose_block, cut, cut_at_block, overwrite, insert, swap_members, replace_by_page
]  # fmt: skip


def write(path: Path, draw: random.Random) -> dict[str, dict[str, bytes]]:
    """A shard of samples with a picture, a text and JSON; their members by key."""
    samples = {
        f"{number:04d}": {
            "jpg": draw.randbytes(draw.choice([100, 512, 700, 3000])),
            "txt": f"a caption, {number}".encode(),
            "json": b'{"n": %d}' % number,
        }
        for number in range(SAMPLES)
    }
    write_shard(path, samples.items())
    return samples


def check(folder: Path, full: bool) -> Found:
    draw = random.Random(0)
    path = folder / "a.tar"
    samples = write(path, draw)
    data, places = path.read_bytes(), read_manifest(path).samples
    with_manifest = manifest_path(path).read_text()
    found, totals = Found(""), Counter()
    count = 1000 if full else 150
    signal.signal(signal.SIGALRM, _hung)
    for number in range(count):
        damaged = bytearray(data)
        kind = DAMAGE[number % len(DAMAGE)]
        kind(damaged, draw)
        path.write_bytes(damaged)
        intact = {
            key
            for key, members in places.items()
            if all(damaged[at : at + size] == data[at : at + size] for at, size, _ in members.values())
        }
        signal.setitimer(signal.ITIMER_REAL, 20)
        try:
            manifest_path(path).write_text(with_manifest)
            _with_manifest(path, samples, intact, totals)
            manifest_path(path).unlink()
            _without_manifest(path, samples, len(damaged), data == damaged, totals)
        except Exception as error:  # whatever it is, the promise is broken
            found.failures.append(f"damage {number}, {kind.__name__}: {type(error).__name__}: {error}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    if totals["delivered"] + totals["counted"] != count * SAMPLES:
        found.failures.append(f"{totals['delivered']} delivered and {totals['counted']} counted of {count * SAMPLES}")
    found.figure = (
        f"{count} shards damaged in {len(DAMAGE)} ways: {totals['delivered']:,} intact samples delivered +"
        f" {totals['counted']:,} counted = {count * SAMPLES:,} in the manifests, 0 damaged delivered; without"
        f" manifest {totals['reported']} reported, {totals['whole']} still well-formed archives"
    )
    if found.failures:
        found.figure = f"{len(found.failures)} of {count} shards not handled"
    found.numbers = dict(totals)
    return found


def _collate(examples: dict[str, list[str]]) -> SimpleNamespace:
    return SimpleNamespace(keys=examples["a"], bad={})


def _hung(number: int, frame: object) -> None:
    raise TimeoutError("no end after 20 s")


def _with_manifest(path: Path, samples: dict, intact: set[str], totals: Counter[str]) -> None:
    """Through random access, and as training draws them, which counts what is left out."""
    shards, got = ShardSet([str(path)]), set()
    for number in range(len(shards)):
        try:
            sample = shards[number]
        except BadSample as error:
            assert error.reason in ("checksum", "truncated") and str(path) in str(error), error
            continue
        assert sample.members == samples[sample.key], f"{sample.key} delivered damaged"
        got.add(sample.key)
    assert got == intact, f"{len(intact - got)} intact samples not delivered"
    steps = StepDataset({"a": (open_shards([str(path)]), SAMPLES, lambda sample, rng: sample.key)}, _collate)
    [batch] = steps[0]
    assert set(batch.keys) == intact and len(batch.keys) == len(intact), "training drew other samples"
    totals["delivered"] += len(batch.keys)
    totals["counted"] += sum(batch.bad.values())


def _without_manifest(path: Path, samples: dict, size: int, same: bool, totals: Counter[str]) -> None:
    """Only the archive's structure can be checked: whatever is missing or cut must be told of, with file and place."""
    bad: list[BadSample] = []
    streamed: list[Sample] = list(stream_samples([str(path)], bad.append))
    assert all(str(path) in str(error) for error in bad)
    lost = samples.keys() - {s.key for s in streamed if s.members.keys() == {"jpg", "txt", "json"}}
    cut_short = _is_cut(path)
    assert bad or not cut_short, "a cut archive ended in silence"
    if cut_short:
        try:
            ShardSet([str(path)])
        except DataError as error:
            assert str(path) in str(error)
        else:
            raise AssertionError("a cut archive was indexed in silence")
    assert bad or not lost or _renamed(path), f"{len(lost)} samples were lost in silence"
    totals["reported" if bad else "whole"] += 1


def _is_cut(path: Path) -> bool:
    """Whether the file does not end in the two empty blocks of an archive."""
    data = path.read_bytes()
    return len(data) < 2 * BLOCK or any(data[-2 * BLOCK :])


def _renamed(path: Path) -> bool:
    """Whether damage left an archive that is well formed and simply another one: members moved, whole ones gone."""
    with tarfile.open(path) as archive:
        archive.getmembers()
        return True
