"""Promise 10: whatever a server does, nothing is lost in silence, delivered twice, or waited for without a word."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mhmoe_vl.data import remote
from mhmoe_vl.data.sample import BadSample
from mhmoe_vl.data.shards import ShardSet, stream_samples
from mhmoe_vl.data.writing import pack_shards
from mhmoe_vl.errors import DataError

from .harness import Found

TITLE = "shards over http"
SAMPLES, PER_SHARD = 40, 10
SCALE = 60
"""The limits are this much shorter in the tests, with all proportions kept."""
FAULTS = [
    "stall", "stall late", "drip", "cut", "cut at once", "long length", "short length", "no length", "negative length",
    "length of words", "redirect loop", "redirect to file", "redirect to ftp", "404", "500", "503", "changed",
    "other bytes", "no ranges", "wrong range", "empty", "page", "garbage for http",
]  # fmt: skip
PASSING = {"stall", "stall late", "cut", "cut at once", "500", "503", "empty", "garbage for http", "drip"}
"""faults that are gone at the next attempt: nothing at all may be missing"""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        name = self.path.strip("/").split("/")[-1]
        data = server.files.get(name)
        fault = server.fault if name == server.target and server.left > 0 else ""
        server.left -= bool(fault)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._answer(data, fault)

    def _answer(self, data: bytes | None, fault: str) -> None:
        if data is None or fault in ("404", "500", "503"):
            return self.send_error(int(fault) if fault else 404)
        if fault.startswith("redirect"):
            target = {"loop": self.path, "to file": "file:///etc/passwd", "to ftp": "ftp://127.0.0.1/a.tar"}
            self.send_response(302)
            self.send_header("Location", target[fault.removeprefix("redirect ")])
            return self.end_headers()
        if fault == "garbage for http":
            self.wfile.write(b"\0\1\2 not http at all\r\n\r\n")
            return None
        if fault in ("changed", "other bytes"):
            data = data[:700] + bytes(byte ^ 85 for byte in data[700:])
        if fault == "page":
            data = b"<html>log in first</html>"
        wanted = self.headers.get("Range") if fault != "no ranges" else None
        tag = '"2"' if fault == "changed" else '"1"'
        if self.headers.get("If-Range") not in (None, tag):
            wanted = None
        first, _, last = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
        piece = data[int(first) : int(last) + 1 if last else None]
        if fault == "wrong range":
            piece = data[: len(piece)]
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", tag)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(piece) - 1}/{len(data)}")
        lengths = {"long length": len(piece) + 999, "short length": len(piece) // 2, "negative length": -5}
        lengths |= {"length of words": "many", "empty": 0}
        if fault != "no length":
            self.send_header("Content-Length", str(lengths.get(fault, len(piece))))
        self.end_headers()
        self._body(piece, fault)
        return None

    def _body(self, piece: bytes, fault: str) -> None:
        if fault in ("empty", "cut at once"):
            return
        if fault == "stall":
            self.server.stopped.wait(20)
        elif fault == "stall late":
            self.wfile.write(piece[: len(piece) // 2])
            self.wfile.flush()
            self.server.stopped.wait(20)
        elif fault == "drip":
            for byte in piece:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                if self.server.stopped.wait(0.1):
                    return
        else:
            self.wfile.write(piece[: len(piece) // 2] if fault == "cut" else piece)


class _Words(logging.Handler):
    """When something was said last."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.times.append(time.monotonic())


def _member(number: int) -> tuple[str, dict[str, bytes]]:
    return f"{number:03d}", {"txt": b"sample %d" % number, "jpg": bytes([number]) * 900}


def check(folder: Path, full: bool) -> Found:
    found = Found("")
    paths = pack_shards(folder, range(SAMPLES), _member, samples_per_shard=PER_SHARD, progress=False)
    getfqdn, socket.getfqdn = socket.getfqdn, lambda name="": name  # the server would ask a name server
    os.environ["no_proxy"] = "127.0.0.1"
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server.fault, server.left, server.target, server.stopped = "", 0, paths[1].name, threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    limits = remote.TIMEOUT, remote.PAUSES, remote.LEAST_RATE
    remote.TIMEOUT, remote.PAUSES = limits[0] / SCALE, tuple(pause / SCALE for pause in limits[1])
    words, logger, level = _Words(), logging.getLogger("mhmoe_vl"), logging.getLogger("mhmoe_vl").level
    logger.addHandler(words)
    logger.setLevel(logging.WARNING)
    logger.propagate, propagate = False, logger.propagate
    urls = [f"http://127.0.0.1:{server.server_port}/{path.name}" for path in paths]
    longest, cases, attempts = 0.0, 0, 0
    try:
        for fault in FAULTS if full else FAULTS[::3]:
            for times in (1, 99):
                for read in (_stream, _random_access):
                    server.fault, server.left, cases = fault, times, cases + 1
                    words.times = [time.monotonic()]
                    problem = read(urls, None if times == 1 and fault in PASSING else paths[1].name, words)
                    longest = max([longest, *(b - a for a, b in zip(words.times, words.times[1:], strict=False))])
                    attempts = max(attempts, times - server.left)
                    if problem:
                        found.failures.append(f"{fault} x {times}, {read.__name__.strip('_')}: {problem}")
    finally:
        socket.getfqdn = getfqdn
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
        remote.TIMEOUT, remote.PAUSES, remote.LEAST_RATE = limits
        logger.removeHandler(words)
        logger.setLevel(level)
        logger.propagate = propagate
    if full and longest * SCALE > 60:
        found.failures.append(f"{longest * SCALE:.0f} s without a sample or a word")
    found.figure = (
        f"{cases} cases of {len(FAULTS if full else FAULTS[::3])} faults, passing and lasting: every sample delivered"
        f" once or its loss told; at most {longest * SCALE:.0f} s without a sample or a word (limits run {SCALE} times"
        " faster)"
    )
    found.numbers = {"cases": cases, "longest_s": longest * SCALE}
    return found


def _right(key: str, members: dict[str, bytes]) -> bool:
    return members == _member(int(key))[1]


def _verdict(keys: Counter[str], wrong: list[str], lost: set[str], bad: list[str], target: str | None) -> str | None:
    if wrong:
        return f"delivered with other bytes: {wrong[:3]}"
    if any(count > 1 for count in keys.values()):
        return "delivered twice"
    if lost and not bad:
        return f"{len(lost)} samples lost in silence"
    if lost and target is None:
        return f"{len(lost)} samples lost though the fault passed: {bad[:1]}"
    if any(not PER_SHARD <= int(key) < 2 * PER_SHARD for key in lost):
        return f"lost samples of other shards: {sorted(lost)[:3]}"
    return None


def _all_keys() -> set[str]:
    return {f"{number:03d}" for number in range(SAMPLES)}


def _stream(urls: list[str], target: str | None, words: _Words) -> str | None:
    keys, wrong, bad = Counter(), [], []
    for sample in stream_samples(urls, lambda error: bad.append(str(error))):
        words.times.append(time.monotonic())
        keys[sample.key] += 1
        if not _right(sample.key, sample.members):
            wrong.append(sample.key)
    words.times.append(time.monotonic())
    # A stream has no checksums: bytes that a server exchanges are only noticed where headers are hit.
    return _verdict(keys, wrong, _all_keys() - set(keys), bad, target)


def _random_access(urls: list[str], target: str | None, words: _Words) -> str | None:
    keys, wrong, bad = Counter(), [], []
    try:
        samples = ShardSet(urls)
    except DataError as error:
        return None if urls[1].rsplit("/", 1)[-1].removesuffix(".tar") in str(error) else str(error)
    for number in range(len(samples)):
        try:
            sample = samples[number]
        except BadSample as error:
            bad.append(str(error))
        else:
            keys[sample.key] += 1
            if not _right(sample.key, sample.members):
                wrong.append(sample.key)
        words.times.append(time.monotonic())
    return _verdict(keys, wrong, _all_keys() - set(keys), bad, target)
