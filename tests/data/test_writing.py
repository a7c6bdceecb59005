"""Writing shards: round trips, same bytes, and runs that are killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import pytest

from mhmoe_vl.data.manifest import manifest_path
from mhmoe_vl.data.shards import ShardSet
from mhmoe_vl.data.writing import pack_shards, write_shard
from mhmoe_vl.errors import DataError


def read_number(number: int) -> tuple[str, dict[str, str]]:
    return f"{number:04d}", {"txt": str(number)}


def test_manifest_states_places_sizes_and_checksums(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, [("x/1", {"jpg": b"picture", "txt": "né"}), ("2", {"json": {"é": [1, None]}})])
    data = path.read_bytes()
    document = json.loads((tmp_path / "a.manifest.json").read_text())
    assert document["version"] == 1
    assert (document["shard"], document["size"]) == ("a.tar", len(data))
    assert document["sha256"] == hashlib.sha256(data).hexdigest()
    assert [sample["key"] for sample in document["samples"]] == ["x/1", "2"]
    contents = {"jpg": b"picture", "txt": "né".encode(), "json": '{"é": [1, null]}'.encode()}
    for sample in document["samples"]:
        for extension, (offset, size, crc) in sample["members"].items():
            assert data[offset : offset + size] == contents[extension]
            assert crc == zlib.crc32(contents[extension])
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["x/1.jpg", "x/1.txt", "2.json"]


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.tar", map(read_number, range(5)))
        time.sleep(0.01)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


@pytest.mark.parametrize(
    ("samples", "what"),
    [
        ([("1", {"pkl": b"x"})], "1.pkl: member refused for its extension"),
        ([("../1", {"txt": "x"})], "refused for its name"),
        ([("1.2", {"txt": "x"})], "1.2.txt: member refused for its extension"),
        ([("./1", {"txt": "x"})], "refused for its name"),
        ([("1", {"txt": "x" * 64_001})], "refused for its size, 64001 bytes"),
        ([("1", {"txt": "x"}), ("1", {"txt": "y"})], "a.tar:1: key given twice"),
        ([("1", {})], "a.tar:1: no members"),
        ([("1", {"json": {1, 2}})], "1.json: cannot be written as text"),
        ([("1", {"json": float("nan")})], "1.json: cannot be written as text"),
    ],
)
def test_refuses_what_a_shard_cannot_hold(tmp_path: Path, samples: list, what: str) -> None:
    with pytest.raises(DataError, match=what):
        write_shard(tmp_path / "a.tar", samples)
    assert not (tmp_path / "a.tar").exists()
    assert not (tmp_path / "a.manifest.json").exists()


def test_an_interrupted_shard_never_stands_under_its_name(tmp_path: Path) -> None:
    def samples():
        yield read_number(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.tar", samples())
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.part"]


def test_pack_splits_in_order_and_keeps_whole_shards(tmp_path: Path) -> None:
    calls = []

    def read(number: int) -> tuple[str, dict[str, str]]:
        calls.append(number)
        return read_number(number)

    paths = pack_shards(tmp_path, range(10), read, samples_per_shard=4, progress=False)
    assert [path.name for path in paths] == [f"shard-00000{i}.tar" for i in range(3)]
    assert [sample.text() for sample in ShardSet([str(path) for path in paths])] == [str(i) for i in range(10)]
    first = [path.read_bytes() for path in paths]
    calls.clear()
    paths[1].write_bytes(b"cut")
    manifest_path(paths[2]).unlink()
    assert pack_shards(tmp_path, range(10), read, samples_per_shard=4, progress=False) == paths
    assert calls == [4, 5, 6, 7, 8, 9]
    assert [path.read_bytes() for path in paths] == first


def test_pack_refuses_a_folder_with_more_shards(tmp_path: Path) -> None:
    pack_shards(tmp_path, range(10), read_number, samples_per_shard=4, progress=False)
    with pytest.raises(DataError, match=r"shard-000002.tar: not of the 2 shards"):
        pack_shards(tmp_path, range(8), read_number, samples_per_shard=4, progress=False)


SCRIPT = """
import sys, time
sys.path[:0] = [{root!r}]
from mhmoe_vl.data.writing import pack_shards

def read(number):
    time.sleep(0.002)
    return f"{{number:04d}}", {{"txt": str(number), "jpg": bytes(2000)}}

if __name__ == "__main__":
    pack_shards({folder!r}, range(120), read, samples_per_shard=10, processes={processes}, progress=False)
"""


def run_packer(tmp_path: Path, folder: str, processes: int, kill_after: float | None) -> None:
    script = tmp_path / "pack.py"
    script.write_text(
        SCRIPT.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path / folder), processes=processes)
    )
    process = subprocess.Popen([sys.executable, str(script)])
    if kill_after is None:
        assert process.wait(60) == 0
        return
    while not list((tmp_path / folder).glob("*.tar")):
        time.sleep(0.005)
    time.sleep(kill_after)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)


def test_a_killed_packer_is_finished_by_running_it_again(tmp_path: Path) -> None:
    run_packer(tmp_path, "whole", 1, None)
    for delay in (0.0, 0.03, 0.08):
        run_packer(tmp_path, "killed", 1, delay)
        for path in (tmp_path / "killed").glob("*.tar"):
            assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    run_packer(tmp_path, "killed", 1, None)
    files = {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


def test_the_number_of_processes_does_not_show(tmp_path: Path) -> None:
    run_packer(tmp_path, "one", 1, None)
    run_packer(tmp_path, "two", 2, None)
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert len(files) == 24
