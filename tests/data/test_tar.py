"""The strict tar reader against tarfile, and against damage of every kind."""

from __future__ import annotations

import io
import random
import tarfile

import pytest

from mhmoe_vl.data.manifest import scan, scan_fully
from mhmoe_vl.data.sample import BadSample, split_name
from mhmoe_vl.data.tar import read_members

BLOCK = 512


def archive(names: list[str], form: int = tarfile.PAX_FORMAT, size: int = 700) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes([number + 1]) * size))
    return file.getvalue()


def read(data: bytes) -> list[tuple[str, bytes]]:
    return [(member.name, content) for member, content in read_members(io.BytesIO(data), "s.tar", lambda _: True)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_tarfile_writes(form: int) -> None:
    names = ["1.jpg", "folder/" + "x" * 90 + "/2.txt", "a/" + "deep/" * 8 + "3.json"]
    if form != tarfile.USTAR_FORMAT:
        names += ["k" * 300 + ".txt", "ключ.txt"]
    data = archive(names, form)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(member.name, tar.extractfile(member).read()) for member in tar]
    assert read(data) == expected
    assert [name for name, _ in expected] == names


def test_folders_links_and_devices_are_no_samples() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("x.txt")
            info.type, info.linkname, info.size = kind, "/etc/passwd", 10**6
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("good.txt"))
    index = scan(io.BytesIO(file.getvalue()), "s.tar")
    assert list(index.samples) == ["good"]
    assert index.count_left_out() == {"not a file": 4}


def test_members_that_are_no_part_of_a_sample_are_counted() -> None:
    refused = ["1.pkl", "5.jpg.gz", "6.__bad__", "../2.jpg", "/3.jpg", ".4.jpg", "7", "a\x1b.txt"]
    index = scan(io.BytesIO(archive(["1.jpg", *refused, "1.jpg", "1.TXT"])), "s.tar")
    assert {key: list(members) for key, members in index.samples.items()} == {"1": ["jpg", "txt"]}
    assert index.count_left_out() == {"extension": 3, "duplicate": 1, "name": 5}


def test_a_text_member_over_64_kb_is_left_out_unread() -> None:
    index = scan_fully(io.BytesIO(archive(["1.txt"], size=64_001)), "s.tar")
    assert index.left_out == [("1.txt", "size")]


def test_every_cut_is_noticed() -> None:
    data = archive([f"{i}.txt" for i in range(3)])
    end = 3 * (BLOCK + 1024) + 2 * BLOCK
    for cut in range(0, end, 100):
        for stream in (io.BytesIO(data[:cut]), _Pipe(data[:cut])):
            with pytest.raises(BadSample, match=r"s.tar:byte") as caught:
                list(read_members(stream, "s.tar", lambda _: False))
            assert caught.value.reason == "truncated"
    assert len(read(data[:end])) == 3


def test_every_header_bit_flip_is_noticed() -> None:
    data = archive([f"{i}.txt" for i in range(3)])
    draw = random.Random(0)
    positions = [*range(154), *range(156, BLOCK)]  # 154 and 155 are padding, which may be a space or a zero
    for _ in range(300):
        damaged = bytearray(data)
        damaged[draw.randrange(3) * (BLOCK + 1024) + draw.choice(positions)] ^= 1 << draw.randrange(8)
        with pytest.raises(BadSample):
            read(bytes(damaged))


@pytest.mark.parametrize("size", [BLOCK, 2 * BLOCK])
def test_a_zeroed_block_is_no_end(size: int) -> None:
    data = bytearray(archive([f"{i}.txt" for i in range(3)], size=BLOCK))
    data[2 * BLOCK : 2 * BLOCK + size] = bytes(size)
    with pytest.raises(BadSample) as caught:
        read(bytes(data))
    assert caught.value.reason == "trailing data"


def test_a_declared_size_is_not_believed() -> None:
    info = tarfile.TarInfo("1.jpg")
    info.size = 8 * 2**30
    data = info.tobuf() + bytes(3000)
    asked = []
    with pytest.raises(BadSample) as caught:
        list(read_members(io.BytesIO(data), "s.tar", lambda member: asked.append(member.size) or False))
    assert asked == [8 * 2**30]
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"<html>" * 1000, b"\x1f\x8b" + bytes(2000)])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(BadSample):
        read(data)


class _Pipe(io.BytesIO):
    def seekable(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("000.jpg", ("000", "jpg")),
        ("a/b.c/1.JPG", ("a/b.c/1", "jpg")),
        ("./1.left.jpg", ("1", "left.jpg")),
        ("héé.txt", ("héé", "txt")),
        ("../1.jpg", None),
        ("a/../1.jpg", None),
        ("/1.jpg", None),
        ("a//1.jpg", None),
        (".jpg", None),
        ("1", None),
        ("a/.1.jpg", None),
        ("x\udce9.jpg", None),
        ("k" * 513 + ".jpg", None),
    ],
)
def test_split_name(name: str, expected: tuple[str, str] | None) -> None:
    assert split_name(name) == expected
