"""Promise 8: small files that want much memory or time get neither.

Every bomb goes to what would read it in a run, in a process of its own; memory is the peak above that at its start, and
time is processor time, so that other work on the machine does not count.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from mhmoe_vl import config
from mhmoe_vl.data.manifest import MAX_BYTES, manifest_path
from mhmoe_vl.data.sample import MAX_MEMBER_BYTES, BadSample
from mhmoe_vl.data.shards import ShardSet, expand_shards, stream_samples
from mhmoe_vl.data.transforms import ImageTransform
from mhmoe_vl.errors import MhmoeError
from mhmoe_vl.models.convert_vqkd import read_weights
from mhmoe_vl.train import checkpoint

from .harness import Found, measured

TITLE = "bombs"
MEBIBYTES, SECONDS = 300, 2.0


class Bomb(NamedTuple):
    name: str
    write: Callable[[Path], None]
    use: Callable[[Path], object]


# ---------------------------------------------------------------------------------------------- pictures
def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, extra: bytes = b"") -> bytes:
    """A PNG of that size in three colours, all black; pixels beyond 30 million are left out."""
    data = zlib.compressobj(1)
    rows = min(height, 30_000_000 // max(1, width))
    body = b"".join([*(data.compress(bytes(1 + 3 * width)) for _ in range(rows)), data.flush()])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _saved(mode: str, form: str, side: int, **options) -> bytes:
    file = io.BytesIO()
    image = Image.new("RGB" if mode == "I;16" else mode, (side, side))
    if mode == "I;16":
        image = Image.fromarray(np.full((side, side), 3000, np.uint16))
    image.save(file, form, **options)
    return file.getvalue()


def _pictures() -> Iterator[Bomb]:
    turned = Image.Exif()
    turned[0x0112] = 6
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "x" * 60_000_000, zip=True)
    made: dict[str, Callable[[], bytes]] = {
        "PNG of 30,000 x 30,000": lambda: _png(30_000, 30_000),
        "PNG of 13,000 x 13,000": lambda: _png(13_000, 13_000),
        "PNG of 1 x 100,000": lambda: _png(1, 100_000),
        "PNG of 0 x 0": lambda: _png(0, 0),
        "PNG of 5,000 x 5,000": lambda: _png(5000, 5000),
        "PNG with 60 MB of text": lambda: _saved("RGB", "PNG", 100, pnginfo=text),
        "PNG with a colour profile of 200 MB": lambda: _png(
            9, 9, _chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200_000_000)))
        ),
        "PNG with alpha, turned": lambda: _saved("RGBA", "PNG", 5000, exif=turned),
        "PNG of 16 bits": lambda: _saved("I;16", "PNG", 5000),
        "PNG with palette": lambda: _saved("P", "PNG", 5000, transparency=0),
        "JPEG of 5,000 x 5,000": lambda: _saved("RGB", "JPEG", 5000),
        "progressive JPEG": lambda: _saved("RGB", "JPEG", 5000, progressive=True, subsampling=0),
        "progressive JPEG, turned": lambda: _saved("RGB", "JPEG", 5000, progressive=True, subsampling=0, exif=turned),
        "CMYK JPEG": lambda: _saved("CMYK", "JPEG", 5000),
        "JPEG of 65,500 x 65,500": lambda: _saved("L", "JPEG", 100).replace(b"\0\x64\0\x64", b"\xff\xdc\xff\xdc", 1),
        "WebP of 3,870 x 3,870": lambda: _saved("RGB", "WEBP", 3870, quality=10, method=0),
        "lossless WebP with alpha": lambda: _saved("RGBA", "WEBP", 3870, lossless=True, method=0),
        "WebP of 20 frames": lambda: _saved(
            "RGB",
            "WEBP",
            1000,
            save_all=True,
            append_images=[Image.new("RGB", (1000, 1000), (i, 0, 0)) for i in range(20)],
        ),
    }
    for name, make in made.items():
        yield Bomb(name, lambda path, make=make: path.write_bytes(make()) and None, _decode)


def _decode(path: Path) -> None:
    ImageTransform(224)(path.read_bytes(), None)


# -------------------------------------------------------------------------------------- texts and archives
def _tar(*members: tuple[str, bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with tarfile.open(path, "w") as archive:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))

    return write


def _header(declared: int, kind: bytes = tarfile.REGTYPE, form: int = tarfile.GNU_FORMAT, **pax: str) -> bytes:
    info = tarfile.TarInfo("1.jpg")
    info.size, info.type, info.pax_headers = declared, kind, pax
    return info.tobuf(form) + bytes(3072)


def _raw(data: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data()) and None


def _read_shard(path: Path) -> None:
    for sample in stream_samples([str(path)], lambda bad: None):
        for use in (sample.text, sample.json, sample.image):
            with suppress(BadSample):
                use()
    with suppress(MhmoeError):
        samples = ShardSet([str(path)])
        for number in range(min(3, len(samples))):
            with suppress(BadSample):
                samples[number].json()


def _large_pictures(path: Path) -> None:
    """Four pictures of the largest size in one sample, and a sample whose members lie far apart."""
    with tarfile.open(path, "w") as archive:
        for name, size in [*((f"1.{e}", MAX_MEMBER_BYTES) for e in ("jpg", "jpeg", "png", "webp")), ("2.txt", 9)]:
            info = tarfile.TarInfo(name)
            info.size = size
            archive.addfile(info, io.BytesIO(bytes(size)))


def _manifest(text: Callable[[], str]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        _tar(("1.txt", b"a"))(path)
        manifest_path(path).write_text(text())

    return write


ONE_SAMPLE = '{"version":1,"size":9,"sha256":"","samples":[{"key":"1","members":{%s}}]}'


def _archives() -> Iterator[Bomb]:
    nested = b"[" * 60_000
    written = {
        "text of 10 MB": _tar(("1.txt", bytes(10_000_000))),
        "gzipped text": _tar(("1.txt.gz", gzip.compress(bytes(100_000_000), 1)), ("1.txt", b"a")),
        "JSON of 60,000 brackets": _tar(("1.json", nested)),
        "JSON with a number of 60,000 digits": _tar(("1.json", b"9" * 60_000)),
        "text of zero bytes and marks": _tar(("1.txt", "\0\u202e".encode() * 10_000)),
        "member of 8 GiB in 3 kB": _raw(lambda: _header(8 * 2**30)),
        "sparse member": _raw(lambda: _header(2**33, tarfile.GNUTYPE_SPARSE)),
        "pax header with a size of 10^15": _raw(lambda: _header(0, form=tarfile.PAX_FORMAT, size=str(10**15))),
        "pax header of 8 GiB": _raw(lambda: _header(2**33, tarfile.XHDTYPE)),
        "long name of 8 GiB": _raw(lambda: _header(2**33, tarfile.GNUTYPE_LONGNAME)),
        "gzipped archive": _raw(lambda: gzip.compress(bytes(200_000_000), 1)),
        "four largest pictures in a sample": _large_pictures,
        "manifest of lists": _manifest(lambda: "[" + "[]," * (MAX_BYTES // 3 - 1) + "[]]"),
        "manifest of 100 MB": _manifest(lambda: "[" + "[]," * 33_000_000 + "[]]"),
        "manifest with an offset of 10^15": _manifest(lambda: ONE_SAMPLE % '"txt":[1000000000000000,9,1]'),
        "manifest of members far apart": _manifest(lambda: ONE_SAMPLE % '"txt":[0,9,1],"jpg":[99999999999,9,1]'),
    }
    for name, write in written.items():
        yield Bomb(name, write, _read_shard)
    for spec in ("{0..999999999}.tar", "{0..9}" * 9, "{" * 50_000, "a::" * 50_000 + "pipe:x"):
        yield Bomb(f"address {spec[:20]}", lambda path: None, lambda path, spec=spec: expand_shards(spec))


# --------------------------------------------------------------------------------- checkpoints and settings
def _sealed(name: str, write: Callable[[Path], None]) -> Callable[[Path], None]:
    """A checkpoint with another file in it, checksums right."""

    def make(path: Path) -> None:
        last = checkpoint.save(path, {"model": {"w": torch.ones(2)}}, {"step": 1}, "seed: 0\n")
        write(last / name)
        sums = {} if name == "checksums.json" else json.loads((last / "checksums.json").read_text())
        if (last / name).is_file() and not (last / name).is_symlink():
            sums[name] = hashlib.sha256((last / name).read_bytes()).hexdigest()
        sums.setdefault(name, "0")
        if name not in ("checksums.json", "COMPLETE"):
            (last / "checksums.json").write_text(json.dumps(sums))
        (last / "COMPLETE").write_text(hashlib.sha256((last / "checksums.json").read_bytes()).hexdigest())

    return make


def _lying(header: bytes, length: int | None = None) -> Callable[[Path], None]:
    size = len(header) if length is None else length
    return lambda path: path.write_bytes(struct.pack("<Q", size) + header + bytes(64)) and None


def _link(target: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return write


def _fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _read_run(path: Path) -> None:
    checkpoint.newest(path, lambda text: None)


def _packed(path: Path) -> None:
    torch.save({"w": torch.zeros(2**26)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def _filling(path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, pickle.dumps({"w": _Large()}, 2) if name.endswith("data.pkl") else data)


class _Large:
    def __reduce__(self) -> tuple:
        return bytearray, (2**34,)


def _checkpoints() -> Iterator[Bomb]:
    brackets, lists = b"[" * 20_000_000, b"[" + b"[]," * 20_000_000 + b"[]]"
    shape = b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,8]}}'
    for name, write in {
        "model.safetensors": _lying(b"{}", 2**62),
        "ema.safetensors": _lying(b"{}", 99_000_000),
        "optimizer.safetensors": _lying(shape),
        "model.safetensors ": _lying(b'{"a":' * 100_000),
        "state.json": lambda path: path.write_bytes(brackets) and None,
        "state.json ": lambda path: path.write_bytes(lists) and None,
        "checksums.json": lambda path: path.write_bytes(lists) and None,
        "tensors.json": lambda path: path.write_bytes(lists) and None,
        "endless": _link("/dev/zero"),
        "fifo": _fifo,
        "COMPLETE": _link("/dev/zero"),
    }.items():
        yield Bomb(f"checkpoint's {name}", _sealed(name.strip(), write), _read_run)
    for name, write in {
        "of 2^40 numbers": lambda path: torch.save({"w": torch.ones(1).expand(2**40)}, path),
        "compressed": _packed,
        "of 16 GiB of bytes": _filling,
        "of 16 GiB of bytes, old form": lambda path: path.write_bytes(pickle.dumps({"w": _Large()}, 2)) and None,
        "with shapes that lie": lambda path: _lying(shape)(path),
    }.items():
        yield Bomb(f"weights {name}", write, read_weights)
    aliases = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    for name, text in {
        "aliases": aliases,
        "5 MB": "a: [" + "1," * 2_500_000 + "1]",
        "brackets": "a: " + "[" * 90_000,
        "a number of 90,000 digits": "seed: " + "9" * 90_000,
        "keys": "{" + ",".join(f"k{i}: 1" for i in range(9000)) + "}",
    }.items():
        yield Bomb(f"configuration of {name}", lambda path, t=text: path.write_text(t) and None, _configure)


def _configure(path: Path) -> None:
    config.load(config.run_config("masked_modeling"), [path])


def check(folder: Path, full: bool) -> Found:
    found = Found("")
    bombs = [*_pictures(), *_archives(), *_checkpoints()]
    chosen = bombs if full else bombs[::3]
    most, longest = (0.0, ""), (0.0, "")
    for number, bomb in enumerate(chosen):
        place = folder / str(number)
        place.mkdir()
        bomb.write(place / "bomb")
        spent = place / "spent"

        def use(bomb: Bomb = bomb, place: Path = place, spent: Path = spent) -> None:
            began = time.process_time()
            try:
                with suppress(MhmoeError):
                    bomb.use(place / "bomb")
            finally:
                spent.write_text(str(time.process_time() - began))

        result = measured(use, place)
        seconds = float(spent.read_text()) if spent.exists() else result.seconds
        most, longest = max(most, (result.mebibytes, bomb.name)), max(longest, (seconds, bomb.name))
        too_long = full and seconds > SECONDS  # the quick part runs beside other tests
        if result.code != 0 or result.mebibytes > MEBIBYTES or too_long:
            what = f"code {result.code}, {result.mebibytes:.0f} MiB, {seconds:.1f} s: {result.said[-200:]}"
            found.failures.append(f"{bomb.name}: {what}")
    found.figure = (
        f"{len(chosen)} bombs: at most {most[0]:.0f} MiB above the start ({most[1]}) and {longest[0]:.1f} s"
        f" ({longest[1]})"
    )
    found.numbers = {"bombs": len(chosen), "mebibytes": most[0], "seconds": longest[0]}
    return found
