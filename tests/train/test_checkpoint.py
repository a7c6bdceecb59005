from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from mhmoe_vl.errors import CheckpointError
from mhmoe_vl.train import checkpoint

FILES = (
    "COMPLETE", "checksums.json", "config.yaml", "model.safetensors", "optimizer.safetensors", "state.json",
    "tensors.json",
)  # fmt: skip


def save(root: Path, step: int) -> Path:
    parts = {"model": {"w": torch.full((3, 2), float(step))}, "optimizer": {"w:step": torch.tensor(float(step))}}
    return checkpoint.save(root, parts, {"step": step}, "seed: 0\n")


def newest_step(root: Path) -> int:
    found = checkpoint.newest(root, lambda text: None)
    assert float(found.tensors["model"]["w"][0, 0]) == found.state["step"]
    return found.state["step"]


def reseal(folder: Path) -> None:
    """Make checksums right again after a forgery."""
    sums = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir() if f.name in FILES[2:]}
    (folder / "checksums.json").write_text(json.dumps(sums))
    (folder / "COMPLETE").write_text(hashlib.sha256((folder / "checksums.json").read_bytes()).hexdigest())


def test_round_trip_keeps_every_kind_of_tensor(tmp_path):
    tied = torch.randn(4, 3)
    model = {
        "tied": tied,
        "again": tied,
        "transposed": torch.randn(2, 5).T,
        "count": torch.tensor(7),
        "half": torch.randn(3).bfloat16(),
        "mask": torch.tensor([True, False]),
    }
    parts = {"model": model, "optimizer": {}, "ema": {"tied": tied + 1}}
    found = checkpoint.read(checkpoint.save(tmp_path, parts, {"step": 3}, "seed: 0\n"))
    assert found.tensors["model"].keys() == model.keys()
    for name, value in model.items():
        assert torch.equal(found.tensors["model"][name], value)
        assert found.tensors["model"][name].dtype == value.dtype
    assert found.state["step"] == 3
    assert torch.equal(found.weights["tied"], tied + 1)
    assert sorted(path.name for path in found.path.iterdir()) == sorted([*FILES, "ema.safetensors"])


def test_last_becomes_previous_and_names_stay(tmp_path):
    checkpoint.link(save(tmp_path, 1), "best")
    save(tmp_path, 2)
    save(tmp_path, 3)
    steps = {path.name: checkpoint.read(path).state["step"] for path in tmp_path.iterdir()}
    assert steps == {"last": 3, "previous": 2, "best": 1}
    checkpoint.link(tmp_path / "last", "best")
    assert checkpoint.read(tmp_path / "best").state["step"] == 3


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing", "html"])
def test_damage_is_found_and_the_one_before_is_taken(tmp_path, name, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    damaged = {"flip": bytes(data), "cut": bytes(data[:-1]), "empty": b"", "html": b"<html>not found</html>"}
    path.unlink() if damage == "missing" else path.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match=str(tmp_path / "last")):
        checkpoint.read(tmp_path / "last")
    said = []
    assert checkpoint.newest(tmp_path, said.append).state["step"] == 1
    assert len(said) == 1 and str(tmp_path / "last") in said[0]


def test_no_whole_checkpoint_is_an_error_none_at_all_is_not(tmp_path):
    assert checkpoint.newest(tmp_path / "nowhere", print) is None
    assert checkpoint.newest(tmp_path, print) is None
    (save(tmp_path, 1) / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="none of 1 checkpoints can be used"):
        checkpoint.newest(tmp_path, lambda text: None)


class Killed(BaseException):
    pass


def dying(function, countdown):
    def call(*arguments, **options):
        countdown[0] -= 1
        if countdown[0] == 0:
            raise Killed
        return function(*arguments, **options)

    return call


def write_half(path, text):
    """As a process that is killed between making a file and writing it."""
    path.touch()
    raise Killed


@pytest.mark.parametrize("saved_before", [True, False])
def test_a_save_killed_at_any_moment_leaves_a_whole_one(tmp_path, monkeypatch, saved_before):
    root = tmp_path / "run"
    root.mkdir()
    if saved_before:
        save(root, 1)
    shutil.copytree(root, tmp_path / "before")
    moments = 0
    while True:
        shutil.rmtree(root)
        shutil.copytree(tmp_path / "before", root)
        moments += 1
        countdown = [moments]
        with monkeypatch.context() as patch:
            for place, name in (
                (checkpoint, "save_file"), (checkpoint, "_flush"), (checkpoint, "_sha256"),
                (checkpoint.shutil, "rmtree"), (Path, "rename"), (Path, "mkdir"), (Path, "write_text"),
            ):  # fmt: skip
                patch.setattr(place, name, dying(getattr(place, name), countdown))
            try:
                checkpoint.link(save(root, 2), "best")
                break
            except Killed:
                pass
        checkpoint.recover(root)
        assert not [damage for folder in root.iterdir() for damage in checkpoint.find_damage(folder)]
        if saved_before:
            assert newest_step(root) in (1, 2)
        checkpoint.link(save(root, 3), "best")
        assert newest_step(root) == 3
        assert {"best", "last"} <= {path.name for path in root.iterdir()} <= {"best", "last", "previous"}
    assert moments > 20  # or the faults were never injected


def test_a_seal_half_written_seals_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda path, text: write_half(path, text) if "COMPLETE" in path.name else 0)
        patch.setattr(checkpoint, "_sha256", lambda path: "")
        with pytest.raises(Killed):
            save(tmp_path, 1)
    checkpoint.recover(tmp_path)
    assert not list(tmp_path.iterdir()), "nothing to take for a checkpoint"


def test_a_full_disk_leaves_the_old_one_and_no_litter(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_flush", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    assert newest_step(tmp_path) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_neither_saved_nor_read(tmp_path, value):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="'w' is not finite"):
        checkpoint.save(tmp_path, {"model": {"w": torch.tensor([0.0, value])}}, {"step": 2}, "")
    assert newest_step(tmp_path) == 1
    from safetensors.torch import save_file

    save_file({"w": torch.tensor([0.0, value])}, tmp_path / "last" / "model.safetensors")
    reseal(tmp_path / "last")
    with pytest.raises(CheckpointError, match="'w' is not finite"):
        checkpoint.read(tmp_path / "last")


def test_a_later_format_says_upgrade(tmp_path):
    folder = save(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "format": 99, "package": "7.0"}))
    reseal(folder)
    with pytest.raises(CheckpointError, match=r"made by mhmoe_vl 7.0, this is .* \(upgrade\)"):
        checkpoint.read(folder)


def test_checksums_cannot_point_outside(tmp_path):
    folder = save(tmp_path, 1)
    outside = tmp_path / "secret"
    outside.write_text("x")
    sums = json.loads((folder / "checksums.json").read_text())
    sums["../secret"] = hashlib.sha256(b"x").hexdigest()
    (folder / "checksums.json").write_text(json.dumps(sums))
    (folder / "COMPLETE").write_text(hashlib.sha256((folder / "checksums.json").read_bytes()).hexdigest())
    with pytest.raises(CheckpointError, match=r"\.\./secret"):
        checkpoint.read(folder)


def test_weights_that_do_not_fit_are_named_with_both_shapes():
    model = nn.Linear(2, 3)
    tensors = {"weight": torch.zeros(4, 2), "scale": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_weights(model, tensors, Path("run"))
    assert str(caught.value) == (
        "run: 3 of 3 weights that do not fit: bias is missing; scale is not in the model;"
        " weight is (4, 2), the model has (3, 2) (use the run's config.yaml)"
    )
    many = {f"x{number}": torch.zeros(1) for number in range(40)} | model.state_dict()
    with pytest.raises(CheckpointError, match="5 of 40 weights"):
        checkpoint.load_weights(model, many, Path("run"))
    with pytest.raises(CheckpointError, match=r"bias is torch.int64"):
        checkpoint.load_weights(model, model.state_dict() | {"bias": torch.zeros(3, dtype=torch.int64)}, Path("run"))
