"""Reading shards over http: ranges and whole streams, with time limits, retries, and no other protocol.

A failed attempt is told of and repeated three times, after longer and longer pauses; no byte for 30 seconds, or less
than a kilobyte a second over a minute, counts as failure. Redirects are followed to http and https only.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import TypeVar

from ..errors import ConfigError, one_line
from .sample import BadSample

TIMEOUT = 30.0
PAUSES = (0.5, 2.0, 8.0)
LEAST_RATE = 1000.0
"""bytes a second, looked at once an attempt has waited for ``TIMEOUT`` in all"""
PIECE = 2**16
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


def is_url(name: str) -> bool:
    """Whether a shard is read over http."""
    return name.startswith(("http://", "https://"))


def check_scheme(name: str) -> None:
    """Refuse everything but paths and http(s) addresses: a ``pipe:`` is a shell command.

    Raises:
        ConfigError: naming the address.
    """
    if not is_url(name) and _SCHEME.match(name):
        raise ConfigError(f"{name}: only local paths and http(s) addresses are read (download the shards first)")


class _Cut(OSError):
    """The body ended before its stated length, or the server ignored the range asked for."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """The standard rules, which would also follow to ftp."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not is_url(newurl):
            raise urllib.error.HTTPError(newurl, code, "redirect to another protocol", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.OpenerDirector()
for _handler in (
    urllib.request.ProxyHandler,
    urllib.request.UnknownHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPErrorProcessor,
    _Redirects,
):
    _OPENER.add_handler(_handler())


def _open(url: str, byte_range: str | None, tag: str | None = None) -> http.client.HTTPResponse:
    """A response with the whole body or exactly the range; ``tag``: the version that the range must be of."""
    headers = {"User-Agent": "mhmoe-vl", "Accept-Encoding": "identity"}
    if byte_range:
        headers["Range"] = f"bytes={byte_range}"
    if tag:
        headers["If-Range"] = tag
    response = _OPENER.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)  # noqa: S310 (checked scheme)
    if byte_range and (
        response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {byte_range}")
    ):
        response.close()
        raise _Cut("the server does not serve byte ranges")
    return response


def _attempt(url: str, action: Callable[[], Result]) -> Result:
    """``action`` with retries; failures that stay become a BadSample with reason ``"unreachable"``."""
    for pause in (*PAUSES, None):
        try:
            return action()
        except (OSError, http.client.HTTPException, ValueError) as error:  # URLError, timeouts, resets are OSErrors
            status = error.code if isinstance(error, urllib.error.HTTPError) else None
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            what = f"http {status}" if status else f"{error or type(error).__name__}"
            if pause is None or (status is not None and status not in _TRANSIENT):
                message = f"{url}: {what} (check the address and the server)"
                raise BadSample(message, reason="unreachable", shard=url) from error
        logger.warning("%s: %s; tried again in %g s", one_line(url), one_line(what, 100), pause)
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _read(response: http.client.HTTPResponse, size: int) -> Iterator[bytes]:
    """The body piece by piece, at most ``size`` bytes of it."""
    waited, arrived = 0.0, 0
    while arrived < size:
        began = time.monotonic()
        piece = response.read1(min(PIECE, size - arrived))
        waited += time.monotonic() - began  # not the time that the pieces' reader takes
        if not piece:
            return
        arrived += len(piece)
        if waited > TIMEOUT and arrived < LEAST_RATE * waited:
            raise _Cut(f"{arrived} bytes in {waited:.0f} s")
        yield piece


def fetch_range(url: str, start: int, size: int) -> bytes:
    """``size`` bytes from ``start`` of an address whose server serves ranges.

    Raises:
        BadSample: reason ``"unreachable"`` after four attempts.
    """

    def attempt() -> bytes:
        with _open(url, f"{start}-{start + size - 1}") as response:
            data = b"".join(_read(response, size))
        if len(data) != size:
            raise _Cut(f"{len(data)} bytes arrived of {size}")
        return data

    return _attempt(url, attempt) if size else b""


def fetch_optional(url: str, limit: int) -> bytes | None:
    """The body of an address; none when the server says there is nothing (404, 403, 410).

    Raises:
        BadSample: reason ``"unreachable"`` after four attempts, or larger than ``limit`` bytes.
    """

    def attempt() -> bytes | None:
        try:
            with _open(url, None) as response:
                data = b"".join(_read(response, limit + 1))
                expected = response.headers.get("Content-Length", "")
        except urllib.error.HTTPError as error:
            if error.code in (403, 404, 410):
                error.close()
                return None
            raise
        if expected.isdecimal() and len(data) < min(int(expected), limit + 1):
            raise _Cut(f"{len(data)} bytes arrived of {expected}")
        return data

    data = _attempt(url, attempt)
    if data is not None and len(data) > limit:
        raise BadSample(f"{url}: more than {limit} bytes (check the address)", reason="unreachable", shard=url)
    return data


class RemoteStream:
    """An address as a stream to read once from its start; a broken connection is taken up where it broke.

    A server that states no length cannot be told from one that broke off; the archive's own end mark decides then.
    """

    def __init__(self, url: str) -> None:
        self.url, self.position = url, 0
        self.total: int | None = None
        self.tag: str | None = None
        self.response = _attempt(url, self._connect)

    def _connect(self) -> http.client.HTTPResponse:
        if self.position:
            return _open(self.url, f"{self.position}-", self.tag)
        response = _open(self.url, None)
        length = response.headers.get("Content-Length", "")
        self.total = int(length) if length.isdecimal() else None
        if self.total == 0:  # no archive is empty: an error page or a server that starts may be
            response.close()
            raise _Cut("an empty answer")
        tag = response.headers.get("ETag", "W/")
        self.tag = response.headers.get("Last-Modified") if tag.startswith("W/") else tag  # weak tags know no ranges
        return response

    def seekable(self) -> bool:
        return False

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes, fewer only at the end."""
        data = bytearray()

        def attempt() -> None:
            if self.position == self.total:
                return
            if self.response.closed:
                self.response = self._connect()
            try:
                for piece in _read(self.response, size - len(data)):
                    data.extend(piece)
                    self.position += len(piece)
                if len(data) < size and self.total is not None and self.position < self.total:
                    raise _Cut(f"{self.position} bytes arrived of {self.total}")
            except (OSError, http.client.HTTPException, ValueError):
                self.response.close()
                raise

        _attempt(self.url, attempt)
        return bytes(data)

    def __enter__(self) -> RemoteStream:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):
            self.response.close()
