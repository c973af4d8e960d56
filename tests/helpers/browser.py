"""Headless Chromium for tests of pages, which records the messages of the console."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.tool import tool


@contextmanager
def browser() -> Iterator[Any]:
    """Start Chromium, or skip the test if it is not installed."""
    program = tool("chromium", "make browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield chromium
        finally:
            chromium.close()


@contextmanager
def opened(chromium: Any, path: Path, **options: Any) -> Iterator[Any]:
    """Open a page from the disk. Raises at the end: AssertionError if its console had messages."""
    context = chromium.new_context(**options)
    try:
        page = context.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        yield page
        assert complaints == []
    finally:
        context.close()


def violations(page: Any) -> list[str]:
    """Return the violations that axe finds: each rule, and the first element that breaks it."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {each['nodes'][0]['html'][:200]} {each['nodes'][0]['failureSummary']}" for each in found]
