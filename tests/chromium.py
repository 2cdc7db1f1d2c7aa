"""The browser that tests of web pages open."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PROGRAM = Path("/usr/bin/chromium")
SWITCHES = ["--no-sandbox", "--no-first-run", "--disable-background-networking", "--disable-component-update"]


@contextmanager
def chromium() -> Iterator[Callable]:
    """A function that starts Playwright's browser with the switches that it is given; all are closed at the end."""
    if not PROGRAM.exists():
        pytest.skip(f"needs Debian's chromium at {PROGRAM}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browsers = []

        def start(*switches: str):
            browsers.append(playwright.chromium.launch(executable_path=str(PROGRAM), args=[*SWITCHES, *switches]))
            return browsers[-1]

        yield start
        for browser in browsers:
            browser.close()
