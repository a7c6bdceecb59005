"""``mhmoe-vl make-manifest`` and ``check-data`` on whole and damaged shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mhmoe_vl import commands
from mhmoe_vl.data.manifest import manifest_path
from mhmoe_vl.data.writing import pack_shards


def read(number: int) -> tuple[str, dict[str, str]]:
    return f"{number:03d}", {"txt": f"text {number}", "cls": str(number)}


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return pack_shards(tmp_path / "s", range(10), read, samples_per_shard=5, progress=False)


def report(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    capsys.readouterr()
    code = commands.main(["check-data", "--json", str(folder)])
    return code, json.loads(capsys.readouterr().out)


def test_whole_shards_pass(shards: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["check-data", str(shards[0].parent)]) == 0
    assert capsys.readouterr().out == "2 shards, 10 samples, 0 problems\n"


def test_a_flipped_bit_is_listed_with_file_and_member(shards: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(shards[1].read_bytes())
    data[data.index(b"text 7")] ^= 1
    shards[1].write_bytes(data)
    code, found = report(shards[0].parent, capsys)
    assert code == 1
    assert [(p["file"], p["place"], p["reason"]) for p in found["problems"]] == [
        (str(shards[1]), "007.txt", "checksum")
    ]
    assert commands.main(["check-data", str(shards[1])]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{shards[1]}  007.txt  checksum  ")
    assert out.endswith("1 shards, 5 samples, 1 problems; 1 checksum\n")


def test_damage_between_members_is_found(shards: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(shards[0].read_bytes())
    data[data.index(b"text 3") + 100] ^= 1
    shards[0].write_bytes(data)
    code, found = report(shards[0].parent, capsys)
    assert (code, [(p["place"], p["reason"]) for p in found["problems"]]) == (1, [("", "checksum")])


def test_a_cut_shard_lists_every_lost_sample(shards: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    data = shards[0].read_bytes()
    shards[0].write_bytes(data[: data.index(b"text 3")])
    code, found = report(shards[0].parent, capsys)
    assert (code, found["samples"]) == (1, 10)
    assert [(p["place"], p["reason"]) for p in found["problems"]] == [
        ("", "truncated"),
        ("003.txt", "truncated"),
        ("004.txt", "truncated"),
    ]


def test_a_manifest_of_another_shard_is_found(shards: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    manifest_path(shards[0]).write_bytes(manifest_path(shards[1]).read_bytes())
    manifest_path(shards[1]).write_text("{")
    code, found = report(shards[0].parent, capsys)
    assert code == 1
    assert {p["reason"] for p in found["problems"]} == {"missing", "unlisted", "manifest"}


def test_foreign_members_are_counted_and_shards_without_manifest_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ["1.txt", "1.pkl", "1.txt", "../2.txt", "\x1b]0;3.txt"]:
            tar.addfile(tarfile.TarInfo(name))
    code, found = report(tmp_path, capsys)
    assert (code, found["without_manifest"]) == (1, 1)
    assert found["left_out"] == {"extension": 1, "duplicate": 1, "name": 2}
    assert [(p["place"], p["reason"]) for p in found["problems"]] == [("1.txt", "duplicate")]
    assert commands.main(["make-manifest", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1 shards: 1 manifests made, 0 up to date, 0 damaged" in out
    assert "left out 1 members for their extension" in out


def test_make_manifest_makes_what_is_missing_or_old(shards: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    written = manifest_path(shards[0]).read_bytes()
    manifest_path(shards[0]).unlink()
    os.utime(manifest_path(shards[1]), ns=(0, 0))
    for expected in ("2 manifests made, 0 up to date", "0 manifests made, 2 up to date"):
        assert commands.main(["make-manifest", str(shards[0].parent)]) == 0
        assert expected in capsys.readouterr().out
    assert manifest_path(shards[0]).read_bytes() == written
    assert commands.main(["make-manifest", "--force", str(shards[0])]) == 0
    assert "1 manifests made" in capsys.readouterr().out


def test_make_manifest_names_damaged_shards_and_goes_on(shards: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    for shard in shards:
        manifest_path(shard).unlink()
    shards[0].write_bytes(shards[0].read_bytes()[:700])
    assert commands.main(["make-manifest", str(shards[0].parent)]) == 1
    streams = capsys.readouterr()
    assert f"error: {shards[0]}:byte" in streams.err
    assert "1 manifests made, 0 up to date, 1 damaged" in streams.out
    assert not manifest_path(shards[0]).exists()


@pytest.mark.parametrize(
    "arguments",
    [["check-data", "none.tar"], ["check-data", "pipe:ls"], ["make-manifest", "http://h/a.tar"]],
)
def test_mistakes_are_one_line_and_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {arguments[1]}:") and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["make-manifst"], ["check-data"], ["check-data", "a", "--jsn"]])
def test_usage_errors_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        commands.main(arguments)
    assert caught.value.code == 2


def test_help_and_both_commands_load_no_torch() -> None:
    code = (
        "import sys; from mhmoe_vl import commands\n"
        "try: commands.main({arguments})\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    for arguments in (["--help"], ["check-data", "--help"], ["make-manifest", "--help"]):
        command = [sys.executable, "-c", code.format(arguments=arguments)]
        finished = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
        assert finished.returncode == 0
        assert "usage: mhmoe-vl" in finished.stdout
