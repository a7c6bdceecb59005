"""Sets in the official formats: folders of pictures drawn from scenes, and annotation files beside them."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from packing import claim
from scene_drawing import Scene, draw
from tqdm import tqdm

from mhmoe_vl.data.manifest import write_text

JPEG_QUALITY = 92
Files = dict[str, Scene | str]
"""Path below the folder of a set to its content: a scene to draw, or a text."""


def encode(scene: Scene, extension: str = "jpg") -> bytes:
    """The picture of a scene as JPEG or PNG."""
    buffer = io.BytesIO()
    if extension == "jpg":
        draw(scene).save(buffer, "JPEG", quality=JPEG_QUALITY)
    else:
        draw(scene).save(buffer, "PNG")
    return buffer.getvalue()


def write_files(out: Path, files: Files, settings: dict[str, Any], *, processes: int) -> None:
    """Write a set into ``out``: pictures first, texts last, so a set with its annotations is whole.

    Pictures that stand are kept, so a killed run is finished by running it again.

    Args:
        out: made when missing.
        files: what to write.
        settings: the options that decide the output, to be compared with those of an earlier run.
        processes: that draw; the output is the same for any number.

    Raises:
        DataError: ``out`` holds another set.
    """
    claim(out, settings, files)
    scenes = {out / name: content for name, content in files.items() if isinstance(content, Scene)}
    for path in files:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
    missing = [(path, scene) for path, scene in scenes.items() if not path.is_file()]
    _draw_all(missing, processes)
    for name, content in files.items():
        if isinstance(content, str):
            write_text(out / name, content)
    print(f"{out}: {len(scenes)} pictures, {len(files) - len(scenes)} annotation files")


def _draw_all(jobs: Sequence[tuple[Path, Scene]], processes: int) -> None:
    with tqdm(total=len(jobs), desc="drawing", unit="picture") as bar:
        if processes == 1 or len(jobs) < 100:
            for job in jobs:
                _draw_one(job)
                bar.update()
            return
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            for _ in pool.map(_draw_one, jobs, chunksize=32):
                bar.update()


def _draw_one(job: tuple[Path, Scene]) -> None:
    path, scene = job
    part = path.with_name(path.name + ".part")
    part.write_bytes(encode(scene, path.suffix[1:]))
    part.replace(path)


def numbered(items: Sequence[Any], split: int) -> dict[int, Any]:
    """Examples by picture id: odd in training (``split`` 0), even in validation (1)."""
    return {2 * i + 1 + split: item for i, item in enumerate(items)}
