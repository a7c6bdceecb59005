"""Shards over http from a loopback server: ranges, streams, and answers that go wrong."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from mhmoe_vl.data import remote
from mhmoe_vl.data.loader import StreamedShards, open_shards
from mhmoe_vl.data.shards import BadSample, NoIndexError, ShardSet, stream_samples

Pack = Callable[..., list[Path]]


def urls(server: ThreadingHTTPServer, paths: list[Path]) -> list[str]:
    return [f"{server.url}/shards/{path.name}" for path in paths]


def test_random_access_reads_only_the_sample(packed: Pack, server: ThreadingHTTPServer) -> None:
    paths = packed(10, 4)
    remote_set, local = ShardSet(urls(server, paths)), ShardSet([str(path) for path in paths])
    for number in (9, 0, 5):
        server.requests.clear()
        assert remote_set[number].members == local[number].members
        ranges = [wanted for path, wanted in server.requests if path.endswith(".tar")]
        assert len(ranges) == 1 and ranges[0].startswith("bytes=")


def test_streaming_equals_local_reading(packed: Pack, server: ThreadingHTTPServer) -> None:
    paths = packed(10, 4, manifests=False)
    server.lengths = False
    streamed = list(stream_samples(urls(server, paths), pytest.fail))
    assert [sample.members for sample in streamed] == [
        sample.members for sample in stream_samples([str(path) for path in paths], pytest.fail)
    ]


def test_without_manifest_there_is_only_streaming(packed: Pack, server: ThreadingHTTPServer) -> None:
    addresses = urls(server, packed(manifests=False))
    with pytest.raises(NoIndexError, match="no manifest beside it"):
        ShardSet(addresses)
    assert isinstance(open_shards(addresses), StreamedShards)
    assert isinstance(open_shards([str(path) for path in packed()]), ShardSet)


@pytest.mark.parametrize("faults", [[500, 503], [0], [0, 429]])
def test_failures_that_pass_do_not_show(packed: Pack, server: ThreadingHTTPServer, faults: list[int]) -> None:
    paths = packed(6, 6)
    local = list(ShardSet([str(paths[0])]))
    samples = ShardSet(urls(server, paths))
    assert samples[0].members == local[0].members
    server.faults[:] = faults
    assert samples[3].members == local[3].members
    server.faults[:] = faults
    assert [sample.members for sample in stream_samples(urls(server, paths), pytest.fail)] == [s.members for s in local]


@pytest.mark.parametrize(("faults", "requests"), [([404], 1), ([403], 1), ([500] * 3, 3), ([0] * 3, 3)])
def test_failures_that_stay_are_bad_samples(
    packed: Pack, server: ThreadingHTTPServer, faults: list[int], requests: int
) -> None:
    samples = ShardSet(urls(server, packed(6, 6)))
    assert samples[5].key == "00005"
    server.faults[:] = faults
    server.requests.clear()
    with pytest.raises(BadSample, match=server.url) as caught:
        samples[0]
    assert caught.value.reason == "unreachable"
    assert len(server.requests) == requests
    assert samples[0].key == "00000"


def test_a_shard_that_is_gone_is_counted_and_the_next_one_read(packed: Pack, server: ThreadingHTTPServer) -> None:
    paths = packed(10, 4)
    paths[0].unlink()
    bad: list[BadSample] = []
    assert len(list(stream_samples(urls(server, paths), bad.append))) == 6
    assert [(error.reason, error.shard) for error in bad] == [("unreachable", urls(server, paths)[0])]


def test_a_server_without_ranges_says_so(packed: Pack, server: ThreadingHTTPServer) -> None:
    samples = ShardSet(urls(server, packed()))
    server.ranges = False
    with pytest.raises(BadSample, match="does not serve byte ranges"):
        samples[0]


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/x.tar", "file:///etc/passwd"])
def test_redirects_stay_with_http(packed: Pack, server: ThreadingHTTPServer, target: str) -> None:
    (address,) = urls(server, packed(4, 4))
    server.faults[:] = [target]
    bad: list[BadSample] = []
    assert list(stream_samples([address], bad.append)) == []
    assert [error.reason for error in bad] == ["unreachable"]


def test_redirects_to_http_are_followed(packed: Pack, server: ThreadingHTTPServer) -> None:
    (address,) = urls(server, packed(4, 4))
    server.faults[:] = [address]
    assert len(list(stream_samples([f"{server.url}/elsewhere.tar"], pytest.fail))) == 4


def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.2)
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/a.tar"
        started = time.monotonic()
        with pytest.raises(BadSample, match="timed out"):
            remote.fetch_range(address, 0, 10)
        assert time.monotonic() - started < 10


class Slow:
    """A response that takes ``pause`` seconds for every byte."""

    def __init__(self, pause: float) -> None:
        self.pause = pause

    def read1(self, size: int) -> bytes:
        time.sleep(self.pause)
        return b"."


def test_only_the_time_waited_for_the_server_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trickle is cut; a reader of the pieces that takes its time is not the server's fault."""
    monkeypatch.setattr(remote, "TIMEOUT", 0.05)
    with pytest.raises(OSError, match="bytes in 0 s"):
        list(remote._read(Slow(0.03), 100))
    taken = []
    for piece in remote._read(Slow(0.0), 4):
        taken.append(piece)
        time.sleep(0.04)
    assert b"".join(taken) == b"...."
