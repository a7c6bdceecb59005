"""Writing shards that anyone's WebDataset reader can read, and folders of results: whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from tqdm import tqdm

from ..errors import ConfigError, DataError
from .manifest import manifest_path, read_manifest, refusal, scan_fully, to_json, write_text
from .sample import split_name
from .tar import Member

Item = TypeVar("Item")
Members = dict[str, Any]
"""Extension to content: bytes as they are, text as UTF-8, anything else under ``json`` as JSON."""


def write_shard(path: str | Path, samples: Iterable[tuple[str, Members]]) -> None:
    """Write one shard and its manifest.

    The archive grows under ``<path>.part``, is flushed to the disk and read back for the manifest, the manifest is
    written, and last the archive takes its name: a tar under its final name is whole. The same samples give the same
    bytes.

    Args:
        path: ends in ``.tar``; an existing shard is replaced.
        samples: key and members of each sample, in order.

    Raises:
        DataError: a key or extension that a shard cannot hold, a member too large, or a key given twice.
    """
    path = Path(path)
    if path.suffix != ".tar":
        raise DataError(f"{path}: a shard's name ends in .tar (rename it)")
    part = path.with_name(path.name + ".part")
    with part.open("w+b") as file:
        _write_tar(file, path, samples)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        index = scan_fully(file, str(part))
    write_text(manifest_path(path), to_json(index, path.name))
    part.replace(path)


def _write_tar(file: BinaryIO, path: Path, samples: Iterable[tuple[str, Members]]) -> None:
    keys = set()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for key, members in samples:
            if key in keys or not members:
                what = "key given twice" if key in keys else "no members"
                raise DataError(f"{path}:{key}: {what} (mend the samples)")
            keys.add(key)
            for extension, content in members.items():
                _add(archive, path, key, extension, _encode(content, f"{path}:{key}.{extension}"))


def _add(archive: tarfile.TarFile, path: Path, key: str, extension: str, data: bytes) -> None:
    info = tarfile.TarInfo(f"{key}.{extension}")
    info.size = len(data)
    reason = refusal(Member(info.name, 0, info.size, "file"))
    if reason is None and split_name(info.name) != (key, extension):
        reason = "name"
    if reason:
        raise DataError(f"{path}:{info.name}: member refused for its {reason}, {len(data)} bytes (mend the samples)")
    archive.addfile(info, io.BytesIO(data))


def _encode(content: Any, place: str) -> bytes:
    if isinstance(content, bytes):
        return content
    try:
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"{place}: cannot be written as text: {error} (give bytes, text or JSON values)") from error


def pack_shards(
    folder: str | Path,
    items: Sequence[Item],
    read: Callable[[Item], tuple[str, Members]],
    *,
    prefix: str = "shard",
    samples_per_shard: int = 500,
    processes: int = 1,
    progress: bool = True,
) -> list[Path]:
    """Pack ``items`` into ``<prefix>-000000.tar``, ``<prefix>-000001.tar``, ...; returns the paths.

    Shard *i* holds ``items[i * samples_per_shard : (i + 1) * samples_per_shard]`` in that order, whatever the number
    of processes. Shards that stand whole, with a matching manifest, are kept, so a killed run is finished by
    running it again.

    Args:
        folder: made when missing.
        items: anything that ``read`` understands; sent to other processes when there are several.
        read: key and members of one item; a function at the top level of a module when there are several processes.

    Raises:
        DataError: the folder holds more shards of this prefix than the items fill; or a sample cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = {
        folder / f"{prefix}-{start // samples_per_shard:06d}.tar": items[start : start + samples_per_shard]
        for start in range(0, len(items), samples_per_shard)
    }
    if surplus := sorted(set(folder.glob(f"{prefix}-*.tar")) - set(jobs)):
        raise DataError(f"{surplus[0]}: not of the {len(jobs)} shards to write (choose an empty folder)")
    missing = [path for path, chunk in jobs.items() if not _is_whole(path, len(chunk))]
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), unit="shard", disable=not progress) as bar:
        for _ in _run([(path, jobs[path], read) for path in missing], processes):
            bar.update()
    return list(jobs)


def _run(jobs: list[tuple[Path, Sequence[Any], Callable]], processes: int) -> Iterable[None]:
    if processes <= 1 or len(jobs) <= 1:
        yield from map(_pack, jobs)
        return
    # Forking a process that has run torch's threads may hang the child, so children start afresh.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_pack, jobs)


def _pack(job: tuple[Path, Sequence[Any], Callable]) -> None:
    path, items, read = job
    write_shard(path, map(read, items))


def _is_whole(path: Path, num_samples: int) -> bool:
    try:
        index = read_manifest(path)
        return index is not None and len(index.samples) == num_samples and path.stat().st_size == index.size
    except (DataError, FileNotFoundError):
        return False


def write_files(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write files into a folder, each whole or not at all, none before all could be written.

    Raises:
        ConfigError: the folder cannot be written.
    """
    paths = [folder / name for name in files]
    parts = [path.with_name(f"{path.name}.part") for path in paths]
    try:
        for part, content in zip(parts, files.values(), strict=True):
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content)
        for part, path in zip(parts, paths, strict=True):
            os.replace(part, path)
    except OSError as error:
        for part in parts:
            with contextlib.suppress(OSError):
                part.unlink()
        raise ConfigError(f"--out: {folder}: {error.strerror} (name a folder that can be written)") from error
    return paths
