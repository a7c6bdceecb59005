"""The scripts of data_prep stand alone: their folder goes on the path, as it does when one is run."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "data_prep"))


def _start(script: str, *arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, f"data_prep/{script}.py", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes, **options)


def _run_script(script: str, *arguments: object) -> tuple[int, str]:
    process = _start(script, *arguments)
    error = process.communicate()[1]
    return process.returncode, error


@pytest.fixture(scope="session")
def start():
    """start(script, *arguments): the running process of a script of data_prep."""
    return _start


@pytest.fixture(scope="session")
def run_script():
    """run_script(script, *arguments): exit code and stderr of a script of data_prep."""
    return _run_script


def _load(folder: Path) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar")):
        manifest = json.loads(shard.with_suffix(".manifest.json").read_text())
        with tarfile.open(shard) as archive:
            for info in archive:
                key, extension = info.name.split(".")
                samples.setdefault(key, {})[extension] = archive.extractfile(info).read()
        assert {s["key"] for s in manifest["samples"]} <= set(samples)
    return samples


@pytest.fixture(scope="session")
def load():
    """load(folder): key to extension to bytes, read with the standard library only."""
    return _load


@pytest.fixture
def picture():
    """picture(path, color): a small picture file."""

    def make(path: Path, color: str = "red") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), color).save(buffer, "JPEG")
        path.write_bytes(buffer.getvalue())
        return path

    return make
