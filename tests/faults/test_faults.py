"""The quick part of every promise; ``make faults`` runs them at full size."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.__main__ import PROMISES, check


@pytest.mark.slow
@pytest.mark.parametrize("number", PROMISES, ids=PROMISES.get)
def test_promise(number: int, tmp_path: Path) -> None:
    found = check(number, tmp_path, full=False)
    assert found.met, "\n".join(found.failures)
