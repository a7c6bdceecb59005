"""Shared fixtures: the folder with real data, the tools, and one thread per test process."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

# Without a GPU, Triton's kernels run in its interpreter. Triton reads this when it is first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

REAL_DATA = Path(os.environ.get("MHMOE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with real data and cases with known outputs; tests that ask for it skip where it is absent."""
    if not REAL_DATA.is_dir() and os.environ.get("MHMOE_REQUIRE_DATA") == "1":
        pytest.fail(f"{REAL_DATA}: no such folder, but MHMOE_REQUIRE_DATA is set")
    if not REAL_DATA.is_dir():
        pytest.skip("no real data: set MHMOE_TEST_DATA to its folder")
    return REAL_DATA


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def tool(monkeypatch):
    """tool(name, *arguments): exit code of a tool, run in this process from the root."""
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)

    def run(name: str, *arguments: object) -> int:
        spec = importlib.util.spec_from_file_location(f"tool_{name}", root / "tools" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *map(str, arguments)])
        try:
            return module.main()
        except SystemExit as stop:
            return stop.code

    return run
