"""A headless browser for the pages, and what the routing tests share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--no-first-run"]  # fmt: skip
SLOWEST = 120_000
"""Milliseconds that a step in the browser may take on a busy machine."""


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium, driven by playwright."""
    program = shutil.which("chromium")
    if program is None and os.environ.get("MHMOE_REQUIRE_BROWSER") == "1":
        pytest.fail("no chromium, but MHMOE_REQUIRE_BROWSER is set (apt-get install chromium)")
    if program is None:
        pytest.skip("no chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program, args=ARGUMENTS, timeout=SLOWEST)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser):
    """open_page(path, **context): a page at which every message, error, dialog and request to elsewhere is noted.

    At the end of the test there must be none.
    """
    troubles, contexts = [], []

    def open_(path: Path, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        context.set_default_timeout(SLOWEST)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: _note(troubles, request.url, path))
        page.goto(path.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert troubles == []


def _note(troubles: list[str], url: str, path: Path) -> None:
    if url != path.as_uri() and not url.startswith("data:image/"):
        troubles.append(f"request: {url[:200]}")


@pytest.fixture
def keep(tmp_path):
    """keep(page, name): a screenshot in the folder MHMOE_ARTIFACTS, or in the test's own."""
    folder = Path(os.environ.get("MHMOE_ARTIFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=folder / f"{name}.png", full_page=True)
