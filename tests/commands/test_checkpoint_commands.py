"""``mhmoe-vl check-checkpoint`` and ``convert-checkpoint``."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mhmoe_vl import commands
from mhmoe_vl.train import checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two checkpoints."""
    for step in (1, 2):
        parts = {"model": {"a": torch.ones(300), "b": torch.arange(9.0)}, "optimizer": {"a:step": torch.tensor(2.0)}}
        checkpoint.save(tmp_path / "checkpoints", parts, {"step": step}, "seed: 0\n")
    return tmp_path


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)


def problems(path: Path, capsys: pytest.CaptureFixture[str]) -> list[dict]:
    code = commands.main(["check-checkpoint", str(path), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == (1 if report["problems"] else 0)
    return report["problems"]


def test_whole_checkpoints_pass(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["check-checkpoint", str(run)]) == 0
    assert capsys.readouterr().out == "2 checkpoints, 0 problems\n"


def test_a_flipped_bit_is_listed_with_file_and_tensor(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "checkpoints/previous/model.safetensors"
    flip(file, -1)  # larger types first, then by name: the last byte is of b
    [problem] = problems(run, capsys)
    message = "damaged, its checksum differs"
    assert problem == {"file": str(file), "place": "b", "reason": "checksum", "message": message}
    assert commands.main(["check-checkpoint", str(run)]) == 1
    assert capsys.readouterr().out.splitlines()[0].split() == [str(file), "b", "checksum", *message.split()]
    assert problems(run / "checkpoints/last", capsys) == []


@pytest.mark.parametrize("name", ["state.json", "COMPLETE", "checksums.json", "config.yaml", "tensors.json"])
def test_damage_elsewhere_names_the_file(run: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    flip(run / "checkpoints/last" / name, 3)
    [problem] = problems(run, capsys)
    assert problem["place"] == ""
    assert problem["file"].endswith("checksums.json" if name == "COMPLETE" else name)
    (run / "checkpoints/last" / name).unlink()
    [problem] = problems(run, capsys)
    assert problem["file"].endswith(f"last/{name}") and "No such file" in problem["message"]


def test_all_damaged_files_are_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("model", "optimizer"):
        flip(run / f"checkpoints/last/{name}.safetensors", -1)
    assert [problem["place"] for problem in problems(run, capsys)] == ["b", "a:step"]


def test_no_checkpoint_is_a_mistake_in_the_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["check-checkpoint", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no checkpoint there")


# ------------------------------------------------------------------------------------------- converting
def test_tensors_keep_names_types_and_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tied = torch.randn(3, 4)
    weights = {"tied": tied, "again": tied, "turned": torch.randn(2, 5).T, "half": torch.ones(3).half()}
    weights |= {"count": torch.tensor(7), "mask": torch.tensor([True, False])}
    torch.save({"model": weights, "args": None}, tmp_path / "w.pth")
    assert commands.main(["convert-checkpoint", str(tmp_path / "w.pth"), "--json"]) == 0
    out = tmp_path / "w.safetensors"
    assert json.loads(capsys.readouterr().out) == [
        {"file": str(tmp_path / "w.pth"), "out": str(out), "tensors": 6, "numbers": 40, "not_finite": []}
    ]
    found = load_file(out)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in weights.items())
    assert commands.main(["convert-checkpoint", str(tmp_path / "w.pth")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_tensors_that_are_not_finite_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"good": torch.ones(2), "bad": torch.tensor([1.0, torch.nan])}, tmp_path / "w.pth")
    assert commands.main(["convert-checkpoint", str(tmp_path / "w.pth"), "--out", str(tmp_path / "x")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{tmp_path / 'w.pth'}  bad  not finite", f"{tmp_path / 'x'}: 2 tensors, 4 numbers"]
    assert (tmp_path / "x").exists()


def hostile(path: Path, kind: str) -> None:
    if kind == "missing":
        return
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"a": Path("x")}))
    elif kind == "cut":
        torch.save({"a": torch.ones(2)}, path)
        path.write_bytes(path.read_bytes()[:-30])
    elif kind == "expanded":
        torch.save({"a": torch.ones(1).expand(2**40)}, path)
    elif kind == "no tensors":
        torch.save({"a": 3}, path)
    else:
        torch.save({"a": torch.ones(2)}, path)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)


@pytest.mark.parametrize("kind", ["missing", "pickle", "cut", "expanded", "no tensors", "compressed"])
def test_other_files_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    hostile(tmp_path / "w.pth", kind)
    assert commands.main(["convert-checkpoint", str(tmp_path / "w.pth")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'w.pth'}: ") and len(line) <= 300
    assert not (tmp_path / "w.safetensors").exists()
