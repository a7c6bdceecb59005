"""Small shards, and a loopback server that can misbehave."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mhmoe_vl.data import remote
from mhmoe_vl.data.writing import pack_shards


def members_of(number: int) -> tuple[str, dict[str, bytes | str | dict]]:
    """Sample ``number``: some bytes under jpg, a caption, a JSON value."""
    jpg = bytes([number % 256]) * (700 + number)
    return f"{number:05d}", {"jpg": jpg, "txt": f"né {number}", "json": {"n": number}}


@pytest.fixture
def packed(tmp_path: Path) -> Callable[..., list[Path]]:
    """Writes shards of numbered samples; the manifests can be left out."""

    def pack(count: int = 10, per_shard: int = 4, manifests: bool = True, folder: str = "shards") -> list[Path]:
        paths = pack_shards(tmp_path / folder, range(count), members_of, samples_per_shard=per_shard, progress=False)
        if not manifests:
            for path in (tmp_path / folder).glob("*.json"):
                path.unlink()
        return paths

    return pack


class _Handler(SimpleHTTPRequestHandler):
    """Serves a folder with byte ranges; ``server.faults`` says how the next answers go wrong."""

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Range")))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, str):
            self.send_response(302)
            self.send_header("Location", fault)
            self.end_headers()
            return
        path = Path(self.translate_path(self.path))
        if (isinstance(fault, int) and fault >= 400) or not path.is_file():
            self.send_error(fault or 404)
            return
        data = path.read_bytes()
        wanted = self.headers.get("Range") if self.server.ranges else None
        start, _, stop = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
        piece = data[int(start) : int(stop) + 1 if stop else None]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{int(start) + len(piece) - 1}/{len(data)}")
        if self.server.lengths:
            self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        self.wfile.write(piece[: len(piece) // 2] if fault == 0 else piece)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A server of ``tmp_path``. ``faults``: answers to come, 0 = cut in the middle, >= 400 = error, text = redirect."""
    monkeypatch.setattr(remote, "TIMEOUT", 5.0)
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(socket, "getfqdn", lambda name="": name)  # the server would ask a name server
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: _Handler(*args, directory=str(tmp_path)))
    httpd.faults, httpd.requests, httpd.ranges, httpd.lengths = [], [], True, True
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()
