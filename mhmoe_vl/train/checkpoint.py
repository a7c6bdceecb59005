"""Checkpoints: folders of safetensors and JSON that are whole or not there.

::

    checkpoints/last, previous, best, step-00000100     each:
        model.safetensors  ema.safetensors (optional)  optimizer.safetensors
        state.json         counters, versions
        config.yaml        of the run
        tensors.json       CRC-32 of every tensor, to tell which one is damaged
        checksums.json     SHA-256 of every file above
        COMPLETE           SHA-256 of checksums.json, written last

A checkpoint is written under a ``.tmp`` name, flushed to disk and renamed; ``last`` becomes ``previous`` only after
the new one is complete. ``best`` and ``step-...`` are hard links to the same files. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import __version__, distributed
from ..checks import CHECKPOINT_FORMAT, check_format
from ..errors import CheckpointError, one_line

MAX_JSON_BYTES = 2**20
"""Most bytes of a checkpoint's JSON files."""
SHOWN = 5


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory.

    Attributes:
        path: where it was read from.
        state: contents of ``state.json``.
        tensors: named CPU tensors by part: ``model``, ``optimizer``, and ``ema`` when there is one.
    """

    path: Path
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights to use the model with: the moving average where one was kept."""
        return self.tensors.get("ema", self.tensors["model"])


# ------------------------------------------------------------------------------------------- writing
def save(root: Path, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], config: str) -> Path:
    """Write ``root/last``; the one that stood there becomes ``root/previous``.

    Args:
        root: the run's ``checkpoints`` folder.
        parts: named tensors of each file, without its ending; ``model`` is required.
        state: JSON values; format and versions are added.
        config: YAML text of the run's configuration.

    Raises:
        CheckpointError: weights are not finite.
        OSError: the disk is full or cannot be written; what stood there is untouched.
    """
    for part, tensors in parts.items():
        _refuse_non_finite(tensors, f"{root}: {part}")
    root.mkdir(parents=True, exist_ok=True)
    recover(root)
    folder = root / "last.tmp"
    try:
        _write(folder, parts, state, config)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(one_line(error)) from error
    _replace(folder, root / "last", root / "previous")
    return root / "last"


def _write(folder: Path, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], config: str) -> None:
    folder.mkdir()
    sums: dict[str, dict[str, int]] = {}
    for part, tensors in parts.items():
        file, tensors = folder / f"{part}.safetensors", separate(tensors)
        save_file(tensors, file)
        sums[file.name] = {name: _crc32(tensor) for name, tensor in tensors.items()}
    (folder / "tensors.json").write_text(json.dumps(sums))
    versions = {"format": CHECKPOINT_FORMAT, "package": __version__, "torch": str(torch.__version__)}
    (folder / "state.json").write_text(json.dumps({**versions, **state}, indent=1))
    (folder / "config.yaml").write_text(config)
    checksums = json.dumps({path.name: _sha256(path) for path in sorted(folder.iterdir())}, indent=1)
    (folder / "checksums.json").write_text(checksums)
    for path in (*folder.iterdir(), folder):
        _flush(path)
    # Under its name once it is whole: a process may be killed between making a file and writing it.
    seal = folder / "COMPLETE.part"
    seal.write_text(hashlib.sha256(checksums.encode()).hexdigest())
    _flush(seal)
    seal.rename(folder / "COMPLETE")
    _flush(folder)


def link(checkpoint: Path, name: str) -> None:
    """Make ``name`` beside ``checkpoint`` a second name of it: hard links where the file system has them."""
    folder = checkpoint.with_name(f"{name}.tmp")
    folder.mkdir()
    for path in sorted(checkpoint.iterdir(), key=lambda path: path.name == "COMPLETE"):  # that one last
        try:
            os.link(path, folder / path.name)
        except OSError:
            shutil.copy2(path, folder / path.name)
    _flush(folder)
    _replace(folder, checkpoint.with_name(name), checkpoint.with_name(f"{name}.old"))
    shutil.rmtree(checkpoint.with_name(f"{name}.old"), ignore_errors=True)


def recover(root: Path) -> None:
    """Tidy up after a process that was killed while saving: finish the renames it began, drop what is incomplete."""
    for folder in sorted(root.glob("*.tmp")) + sorted(root.glob("*.old")):
        final = folder.with_suffix("")
        if (folder / "COMPLETE").is_file() and not final.exists():
            folder.rename(final)
        else:
            shutil.rmtree(folder)


def _replace(new: Path, final: Path, old: Path) -> None:
    if final.exists():
        if old.exists():
            shutil.rmtree(old)
        final.rename(old)
    new.rename(final)
    _flush(final.parent)


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU copies where the file format needs them: it refuses tensors that share memory, such as tied weights."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        result[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        seen.add(tensor.untyped_storage().data_ptr())
    return result


def _refuse_non_finite(tensors: Mapping[str, Tensor], place: str) -> None:
    for name in not_finite(tensors):
        raise CheckpointError(f"{place}: {name!r} is not finite (go back to an earlier checkpoint)")


def not_finite(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Names of the tensors that hold NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            yield name


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------- reading
class Damage(NamedTuple):
    """One thing that is wrong with a checkpoint: in which file and tensor (empty where none can be named)."""

    file: Path
    tensor: str
    what: str


def find_damage(path: Path) -> Iterator[Damage]:
    """What its checksums say against the checkpoint in folder ``path``, file by file; nothing when it is whole."""
    sums = path / "checksums.json"
    try:
        listed, complete = _read_small(sums), _read_small(path / "COMPLETE")
        checksums = json.loads(listed)
        needed = {"model.safetensors", "state.json"} <= checksums.keys()
    except OSError as error:
        yield Damage(Path(error.filename or path), "", f"{error.strerror}: not a whole checkpoint")
        return
    except (ValueError, RecursionError, AttributeError, TypeError):
        yield Damage(sums, "", "damaged, not a list of checksums")
        return
    if complete.strip() != hashlib.sha256(listed).hexdigest().encode():
        yield Damage(sums, "", "damaged, or COMPLETE is")
    elif not needed:
        yield Damage(sums, "", "model or state is not listed")
    for name, expected in checksums.items():
        file = path / name
        if file.parent != path or file.is_symlink() or (file.exists() and not file.is_file()):
            yield Damage(file, "", "listed, but no file of this folder")
            continue
        try:
            if _sha256(file) != expected:
                yield Damage(file, _damaged_tensor(path, name), "damaged, its checksum differs")
        except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
            what = getattr(error, "strerror", None) or error
            yield Damage(file, "", f"{what}: not a whole checkpoint")


def _read_small(path: Path) -> bytes:
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OSError(errno.EINVAL, "no plain file", str(path))
    with path.open("rb") as file:
        return file.read(MAX_JSON_BYTES)  # cut short, it is no JSON


def _damaged_tensor(path: Path, name: str) -> str:
    """The first tensor of a damaged file that differs; empty where the damage is elsewhere, or nobody can tell."""
    try:
        sums = json.loads(_read_small(path / "tensors.json"))[name]
        with safe_open(path / name, "pt") as file:
            return next((key for key, crc in sums.items() if _crc32(file.get_tensor(key)) != crc), "")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError):
        return ""


def verify(path: Path) -> None:
    """Hold a checkpoint to its checksums.

    Raises:
        CheckpointError: it is unfinished, or a file is missing or damaged.
    """
    for file, tensor, what in find_damage(path):
        raise CheckpointError(f"{one_line(f'{file}:{tensor}'.rstrip(':'))}: {what} (take another checkpoint)")


def read_state(path: Path) -> dict[str, Any]:
    """The counters in folder ``path``.

    Raises:
        CheckpointError: they are no such JSON, or come from a later version.
    """
    try:
        state = json.loads(_read_small(path / "state.json"))
    except (OSError, ValueError, RecursionError):
        state = None
    check_format(state, path)
    return state


def read(path: Path) -> Checkpoint:
    """The checkpoint in folder ``path``, verified.

    Raises:
        CheckpointError: it is not whole, comes from a later version, or holds values that are not finite.
    """
    verify(path)
    state = read_state(path)
    try:
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {one_line(error)} (take another checkpoint)") from error
    for part, values in tensors.items():
        _refuse_non_finite(values, f"{path}/{part}.safetensors")
    return Checkpoint(path, state, tensors)


def newest(root: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint below ``root``; damaged ones are passed over and told to ``say``. None when empty.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    if not root.is_dir():
        return None
    recover(root)
    folders = sorted((path for path in root.iterdir() if path.is_dir()), key=_order, reverse=True)
    reasons = []
    for folder in folders:
        try:
            return read(folder)
        except CheckpointError as error:
            say(f"warning: {error}")
            reasons.append(str(error))
    if reasons:
        raise CheckpointError(f"{root}: none of {len(reasons)} checkpoints can be used; the newest: {reasons[0]}")
    return None


def _order(path: Path) -> tuple[float, str]:
    """By step; what cannot even tell its step counts as newest, so that it is reported and not passed over."""
    try:
        return int(json.loads(_read_small(path / "state.json"))["step"]), path.name
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return math.inf, path.name


def share(find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """What ``find`` gives on rank 0, on every rank: the others need not see the files, and cannot find another one."""
    found = []

    def look() -> list[Any] | None:
        found.append(find())
        return found[0] and [str(found[0].path), found[0].state, list(found[0].tensors)]

    header = distributed.on_main(look)
    if header is None:
        return None
    parts = found[0].tensors if found else {}
    flat = distributed.broadcast_tensors({f"{p}/{name}": value for p in parts for name, value in parts[p].items()})
    tensors: dict[str, dict[str, Tensor]] = {part: {} for part in header[2]}  # before the first step one is empty
    for place, value in flat.items():
        part, _, name = place.partition("/")
        tensors[part][name] = value
    return Checkpoint(Path(header[0]), header[1], tensors)


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Fill ``model`` with ``tensors``; every name and shape must fit.

    Raises:
        CheckpointError: names the first few that do not, with both shapes.
    """
    wanted = model.state_dict()
    wrong = [f"{name} is missing" for name in wanted.keys() - tensors.keys()]
    wrong += [f"{name} is not in the model" for name in tensors.keys() - wanted.keys()]
    for name in wanted.keys() & tensors.keys():
        ours, theirs = wanted[name], tensors[name]
        if ours.shape != theirs.shape:
            wrong.append(f"{name} is {tuple(theirs.shape)}, the model has {tuple(ours.shape)}")
        elif ours.is_floating_point() != theirs.is_floating_point():
            wrong.append(f"{name} is {theirs.dtype}, the model has {ours.dtype}")
    if wrong:
        first = f"{min(SHOWN, len(wrong))} of {len(wrong)} weights that do not fit"
        raise CheckpointError(f"{source}: {first}: {'; '.join(sorted(wrong)[:SHOWN])} (use the run's config.yaml)")
    model.load_state_dict(dict(tensors))
