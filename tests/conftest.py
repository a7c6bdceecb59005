"""Shared fixtures: the folder with real data, and one thread per test process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
