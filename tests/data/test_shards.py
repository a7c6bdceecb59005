"""Shard lists, random access, streaming; damaged shards of every kind."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import random
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from mhmoe_vl.data import manifest, shards
from mhmoe_vl.data.manifest import from_json, make_manifest, manifest_path, read_manifest, scan
from mhmoe_vl.data.shards import BadSample, Sample, ShardSet, expand_shards, stream_samples
from mhmoe_vl.errors import ConfigError, DataError

Pack = Callable[..., list[Path]]


def strings(paths: list[Path]) -> list[str]:
    return [str(path) for path in paths]


def stream(paths: list[Path]) -> tuple[list[Sample], Counter[str]]:
    bad: list[BadSample] = []
    samples = list(stream_samples(strings(paths), bad.append))
    return samples, Counter(error.reason for error in bad)


def is_intact(sample: Sample) -> bool:
    """Whether a sample of ``members_of`` in conftest is as it was written."""
    number = int(sample.key)
    jpg = bytes([number % 256]) * (700 + number)
    return (sample.members["jpg"], sample.text(), sample.json()) == (jpg, f"né {number}", {"n": number})


# ---------------------------------------------------------------------------------------------- shard lists
def test_expand_folders_files_braces_and_joins(packed: Pack, tmp_path: Path) -> None:
    paths = strings(packed())
    (tmp_path / "shards" / "shard-000009.tar.part").touch()
    assert expand_shards("shards", tmp_path) == paths
    assert expand_shards(str(tmp_path / "shards")) == paths
    assert expand_shards("shards/shard-{000001..000002}.tar", tmp_path) == paths[1:]
    assert expand_shards("shards/shard-00000{2,0}.tar", tmp_path) == [paths[2], paths[0]]
    assert expand_shards("shards/shard-000002.tar::shards/shard-000000.tar", tmp_path) == [paths[2], paths[0]]
    assert expand_shards("http://h/{8..10}/{a,b}.tar") == [f"http://h/{i}/{c}.tar" for i in (8, 9, 10) for c in "ab"]


@pytest.mark.parametrize(
    "spec",
    [
        "pipe:touch {canary}; cat x.tar",
        "file:///x.tar",
        "hf://a/b.tar",
        "s3://a/{0..9}.tar",
        "PIPE:touch {canary}",
        "a.tar::pipe:x",
    ],
)
def test_other_protocols_are_refused(spec: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    with pytest.raises(ConfigError, match="only local paths and http") as caught:
        expand_shards(spec.replace("{canary}", str(tmp_path / "canary")), tmp_path)
    assert caught.value.args[0].startswith(spec.split("::")[-1].split("{canary}")[0].split("{0")[0])
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("http://h/{0..1000000}.tar", "1000001 shards"),
        ("http://h/{0..999}{0..999}{0..9}.tar", "10000000 shards"),
        ("http://h/{0..999999999999}.tar", "1000000000000 shards"),
        ("http://h/{3..1}.tar", "runs backwards"),
        ("http://h/{abc}.tar", "no range and no list"),
        ("http://h/{0..1.tar", "unbalanced"),
        ([], "names no shards"),
    ],
)
def test_impossible_patterns(spec: str | list[str], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        expand_shards(spec)


def test_missing_empty_and_doubled_shards(packed: Pack, tmp_path: Path) -> None:
    packed()
    (tmp_path / "empty").mkdir()
    for spec, what in [
        ("none.tar", "none.tar: no such shard"),
        ("empty", "no \\*.tar in this folder"),
        ("shards::shards/shard-000001.tar", "shard-000001.tar: named twice"),
    ]:
        with pytest.raises(DataError, match=what):
            expand_shards(spec, tmp_path)


# ---------------------------------------------------------------------------------------------- random access
@pytest.mark.parametrize("manifests", [True, False])
def test_set_gives_every_sample_by_number(packed: Pack, manifests: bool) -> None:
    paths = strings(packed(10, 4, manifests))
    samples = ShardSet(paths)
    assert (len(samples), samples.sizes) == (10, [4, 4, 2])
    for number in random.Random(0).sample(range(10), 10):
        sample = samples[number]
        assert (sample.key, sample.index, sample.shard) == (f"{number:05d}", number, paths[number // 4])
        assert is_intact(sample)
    for outside in (-1, 10):
        with pytest.raises(IndexError):
            samples[outside]


def _read_all(samples: ShardSet, order: list[int], results: multiprocessing.Queue) -> None:
    results.put(all(is_intact(samples[number]) and samples[number].index == number for number in order * 5))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_set_is_shared_by_processes(packed: Pack, method: str) -> None:
    if method == "spawn":
        copy = pickle.loads(pickle.dumps(ShardSet(strings(packed(40, 20)))))
        assert all(map(is_intact, copy))
        return
    samples = ShardSet(strings(packed(40, 20)))
    assert is_intact(samples[0])
    context = multiprocessing.get_context(method)
    results = context.Queue()
    orders = [random.Random(seed).sample(range(40), 40) for seed in range(3)]
    processes = [context.Process(target=_read_all, args=(samples, order, results)) for order in orders]
    for process in processes:
        process.start()
    assert all(map(is_intact, samples))
    assert [results.get(timeout=30) for _ in processes] == [True] * 3
    for process in processes:
        process.join()


def test_files_are_closed_again(packed: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    before = len(os.listdir("/proc/self/fd"))
    samples = ShardSet(strings(packed(40, 4)))
    assert all(map(is_intact, samples))
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    del samples
    assert len(os.listdir("/proc/self/fd")) == before


def test_members_of_a_sample_need_not_be_neighbours(tmp_path: Path) -> None:
    names = ["1.txt", "2.txt", "1.jpg", "2.jpg"]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 5
            tar.addfile(info, io.BytesIO(name.encode()))
    for _ in range(2):
        samples = ShardSet([str(tmp_path / "a.tar")])
        assert [sample.members for sample in samples] == [
            {"txt": b"1.txt", "jpg": b"1.jpg"},
            {"txt": b"2.txt", "jpg": b"2.jpg"},
        ]
        make_manifest(tmp_path / "a.tar")


# ---------------------------------------------------------------------------------------------- damage
def damaged_copies(data: bytes, count: int) -> list[bytes]:
    """Cuts, flipped bits, zeroed blocks, lost blocks and noise at random places."""
    draw = random.Random(7)
    copies = []
    for number in range(count):
        copy, at = bytearray(data), draw.randrange(len(data) - 1100)
        block = at // 512 * 512
        if number % 5 == 0:
            del copy[at:]
        elif number % 5 == 1:
            copy[at] ^= 1 << draw.randrange(8)
        elif number % 5 == 2:
            copy[block : block + 512] = bytes(512)
        elif number % 5 == 3:
            del copy[block : block + 512]
        else:
            copy[at : at + 64] = draw.randbytes(64)
        copies.append(bytes(copy))
    return copies


def test_with_a_manifest_no_damage_is_delivered_and_nothing_intact_is_lost(packed: Pack) -> None:
    (path,) = packed(12, 12)
    data, places = path.read_bytes(), read_manifest(path).samples
    delivered = counted = 0
    for damaged in damaged_copies(data, 200):
        path.write_bytes(damaged)
        intact = {
            key
            for key, members in places.items()
            if all(damaged[start : start + size] == data[start : start + size] for start, size, _ in members.values())
        }
        samples, got = ShardSet([str(path)]), set()
        for number in range(12):
            try:
                got.add(samples[number].key)
            except BadSample as error:
                assert error.reason in ("checksum", "truncated")
                assert str(path) in str(error) and str(error).isprintable()
                counted += 1
        assert got == intact
        delivered += len(got)
    assert delivered + counted == 200 * 12
    assert counted > 200


def test_without_a_manifest_damaged_structure_is_refused_or_counted(packed: Pack) -> None:
    (path,) = packed(12, 12, manifests=False)
    data = path.read_bytes()
    for damaged in damaged_copies(data, 100):
        path.write_bytes(damaged)
        try:
            with path.open("rb") as file:
                scan(file, str(path))
        except BadSample:
            with pytest.raises(DataError, match=r"shard-000000.tar:byte"):
                ShardSet([str(path)])
            samples, bad = stream([path])
            assert sum(bad.values()) == 1
            assert all({"jpg", "txt", "json"} == set(sample.members) for sample in samples)
        else:
            assert len(ShardSet([str(path)])) == len(stream([path])[0])


def test_a_cut_between_members_drops_the_sample_it_may_have_halved(packed: Pack) -> None:
    (path,) = packed(3, 3)
    offset, size, _ = read_manifest(path).samples["00001"]["jpg"]
    path.write_bytes(path.read_bytes()[: offset + size + -size % 512])
    samples, bad = stream([path])
    assert [sample.key for sample in samples] == ["00000"]
    assert bad == {"truncated": 1}


def test_streaming_goes_on_with_the_next_shard(packed: Pack) -> None:
    paths = packed(12, 4)
    paths[1].write_bytes(b"<html>not found</html>")
    paths[0].chmod(0o644)
    samples, bad = stream([*paths, paths[0].parent / "missing.tar"])
    assert [int(sample.key) for sample in samples] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert [sample.index for sample in samples] == list(range(8))
    assert bad == {"truncated": 1, "unreadable": 1}


def test_a_key_that_comes_back_is_counted_as_duplicate(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ["1.txt", "2.txt", "1.txt", "3.txt", "3.txt", "3.json"]:
            tar.addfile(tarfile.TarInfo(name))
    samples, bad = stream([tmp_path / "a.tar"])
    assert [(sample.key, sorted(sample.members)) for sample in samples] == [
        ("1", ["txt"]),
        ("2", ["txt"]),
        ("3", ["json", "txt"]),
    ]
    assert bad == {"duplicate": 2}


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["pkl", "pickle", "pyd", "pth", "x.pyd", "pyd.gz", "npy", "npz", "txt.gz", "tar"])
def test_other_members_are_never_opened(tmp_path: Path, name: str) -> None:
    payload = pickle.dumps(_Canary(tmp_path / "canary"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for member, content in [(f"1.{name}", payload), ("1.txt", b"text")]:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    samples, bad = stream([tmp_path / "a.tar"])
    assert [sample.members for sample in samples] == [{"txt": b"text"}]
    assert [sample.members for sample in ShardSet([str(tmp_path / "a.tar")])] == [{"txt": b"text"}]
    assert not bad
    assert not (tmp_path / "canary").exists()


# ---------------------------------------------------------------------------------------------- manifests, samples
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"version":1,"size":1,"sha256":"","samples":[{"key":"1","members":{"pkl":[0,1,2]}}]}',
        '{"version":1,"size":1,"sha256":"","samples":[{"key":"1","members":{"txt":[0,99999999,2]}}]}',
        '{"version":1,"size":1,"sha256":"","samples":[{"key":"1","members":{"txt":[-1,1,2]}}]}',
        '{"version":1,"size":1,"sha256":"","samples":[{"key":"1","members":{"txt":[0,1]}}]}',
        '{"version":1,"size":1,"sha256":"","samples":[{"key":"1","members":{"txt":[0,1,2]}},{"key":"1","members":{"txt":[0,1,2]}}]}',
        '{"version":1,"size":1,"sha256":"","samples":[{"key":"1","members":{}}]}',
    ],
)
def test_broken_manifests(text: str) -> None:
    with pytest.raises(DataError, match=r"^m.json: not a manifest"):
        from_json(text, "m.json")


def test_manifest_of_another_version() -> None:
    with pytest.raises(DataError, match=r"m.json: manifest version 2, this is 1"):
        from_json('{"version": 2}', "m.json")


def test_a_manifest_that_no_reader_takes_is_not_written(packed: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    [path] = packed(3, 3, manifests=False)
    monkeypatch.setattr(manifest, "MAX_BYTES", 100)
    with pytest.raises(DataError, match="3 samples make a manifest of more than 100 bytes"):
        make_manifest(path)


def test_make_manifest_gives_what_the_packer_wrote(packed: Pack) -> None:
    for path in packed():
        written = manifest_path(path).read_bytes()
        manifest_path(path).unlink()
        assert make_manifest(path) == manifest_path(path)
        assert manifest_path(path).read_bytes() == written


def test_make_manifest_keeps_the_old_one_when_the_shard_is_damaged(packed: Pack) -> None:
    (path,) = packed(3, 3)
    written = manifest_path(path).read_bytes()
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="ends inside or before"):
        make_manifest(path)
    assert manifest_path(path).read_bytes() == written


@pytest.mark.parametrize(
    ("members", "read", "reason"),
    [
        ({"txt": b"a"}, Sample.image, "missing image"),
        ({"jpg": b"a"}, Sample.text, "missing text"),
        ({"txt": b" \n"}, Sample.text, "empty text"),
        ({"txt": b"a\xff"}, Sample.text, "text"),
        ({"json": b"{"}, Sample.json, "json"),
        ({"json": b"[" * 50_000}, Sample.json, "json"),
    ],
)
def test_incomplete_samples_name_shard_and_key(members: dict, read: Callable, reason: str) -> None:
    with pytest.raises(BadSample, match=r"^s.tar:k\x5cx1b: ") as caught:
        read(Sample("k\x1b", members, "s.tar", 0))
    assert caught.value.reason == reason
    assert (pickle.loads(pickle.dumps(caught.value)).reason, caught.value.shard) == (reason, "s.tar")


def test_reads_what_webdataset_writes(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with (tmp_path / "00000.tar").open("wb") as file:
        writer = webdataset.TarWriter(file)
        for number in range(5):
            key = f"{number:09d}"
            sample = {"jpg": b"\xff\xd8" + bytes(number), "txt": f"a {number}", "json": {"key": key}}
            writer.write({"__key__": key, **sample})
        writer.close()
    for samples in (list(ShardSet([str(tmp_path / "00000.tar")])), stream([tmp_path / "00000.tar"])[0]):
        assert [sample.json()["key"] for sample in samples] == [f"{i:09d}" for i in range(5)]
        assert [sample.image()[2:] for sample in samples] == [bytes(i) for i in range(5)]
        assert [sample.text() for sample in samples] == [f"a {i}" for i in range(5)]


def test_webdataset_reads_what_we_write(packed: Pack) -> None:
    webdataset = pytest.importorskip("webdataset")
    (path,) = packed(5, 5)
    with path.open("rb") as file:
        files = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": file}])
        groups = webdataset.tariterators.group_by_keys(files)
        read = [(group["__key__"], group["txt"].decode()) for group in groups]
    assert read == [(f"{i:05d}", f"né {i}") for i in range(5)]
