"""Whether a run starts anew or goes on, and from where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from .. import config as configuration
from ..config import RunConfig
from ..errors import CheckpointError, ConfigError, one_line
from . import checkpoint
from .checkpoint import Checkpoint
from .evaluation import write_texts

HARMLESS = frozenset(["output_dir", "init_from", "task.data_dir"])
"""Keys that may differ from the run that is continued, beside all of ``train`` but :data:`KEPT`."""
KEPT = frozenset(["train.ema_decay"])


def starting_point(run_dir: Path, config: RunConfig, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that ``config.train.resume`` asks to go on from, or none to start anew.

    Raises:
        CheckpointError: ``never`` in a used folder, or no checkpoint is usable.
        ConfigError: the run to continue had another configuration.
    """
    root = run_dir / "checkpoints"
    used = any((run_dir / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints"))
    if config.train.resume == "auto":
        found = checkpoint.newest(root, say)
        if found is not None:
            refuse_changes(found.path / "config.yaml", config)
        return found
    if used:
        raise CheckpointError(
            f"{run_dir}: holds a run already, and train.resume is {one_line(config.train.resume, 80)!r}"
            " (name another output_dir, or set train.resume auto to continue it)"
        )
    return None if config.train.resume == "never" else named(Path(config.train.resume), say)


def named(path: Path, say: Callable[[str], None]) -> Checkpoint:
    """The checkpoint at ``path``, or the newest one of the run folder at ``path``.

    Raises:
        CheckpointError: there is none.
    """
    if (path / "state.json").is_file() or (path / "model.safetensors").is_file():
        return checkpoint.read(path)
    found = checkpoint.newest(path / "checkpoints", say)
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint there (name a run folder or one of its checkpoints)")
    return found


def refuse_changes(saved: Path, config: RunConfig) -> None:
    """Hold ``config`` to the one a run was started with.

    Raises:
        ConfigError: a key that matters differs; names it with both values.
    """
    before = _flat(configuration.load(type(config), [saved]).model_dump(mode="json"))
    now = _flat(config.model_dump(mode="json"))
    for key in sorted(before.keys() | now.keys()):
        harmless = key in HARMLESS or (key.startswith("train.") and key not in KEPT)
        if not harmless and before.get(key) != now.get(key):
            values = f"{one_line(before.get(key), 60)} in the run to continue, {one_line(now.get(key), 60)} now"
            raise ConfigError(f"{saved}: {key}: {values} (set it back, or name another output_dir)")


def write_config(path: Path, config: RunConfig) -> None:
    """Save the resolved configuration as YAML, all or nothing."""
    write_texts(path.parent, {path.name: configuration.dump(config)})


def keep_recorded(run_dir: Path, files: Mapping[str, str], *, goes_on: bool) -> None:
    """Write what a task records of its data to ``run_dir/recorded``; hold a run that goes on to what is there.

    Raises:
        ConfigError: the data are not those that the run began with.
    """
    before = recorded(run_dir) if goes_on else {}
    for name, text in files.items():
        if before.get(name, text) != text:
            what = f"the data now give another one: {_first_difference(before[name], text)}"
            remedy = "restore the data, or name another output_dir"
            raise ConfigError(f"{run_dir / 'recorded' / name}: {what} ({remedy})")
    write_texts(run_dir / "recorded", files)


def _first_difference(before: str, now: str) -> str:
    """Number of the first line that differs, with both lines."""
    pairs = zip_longest(before.split("\n"), now.split("\n"), fillvalue="the end")
    number, lines = next((n, lines) for n, lines in enumerate(pairs, 1) if len(set(lines)) > 1)
    theirs, ours = (one_line(line.rstrip(","), 60) for line in lines)
    return f"line {number}: {theirs} in the run, {ours} now"


def recorded(run_dir: Path) -> dict[str, str]:
    """What :func:`keep_recorded` wrote, text by file name; empty for a task that records nothing."""
    files = sorted(path for path in (run_dir / "recorded").glob("*") if path.is_file() and path.suffix != ".part")
    return {path.name: path.read_text(encoding="utf-8") for path in files}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
