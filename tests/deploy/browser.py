"""A real Chromium and a real `penstock view`, for tests that click.

Invariant: a page that a test opens sends no request to another host, and no script fails in it; else closing it fails.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Locator, Page, sync_playwright

from benchmarks.chaos.launch import ROOT
from tests.patience import ANSWER_SECONDS

ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
Scheme = Literal["light", "dark"]
# plotly.js brings styles for maps, which no page here draws; the policy refuses them, and nothing misses them.
REFUSED = "Applying inline style violates"


def chromium() -> str | None:
    """The browser of this host."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextlib.contextmanager
def running_browser(executable: str) -> Iterator[Browser]:
    """A browser without a profile; it ends with the block."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(ARGUMENTS))
        yield browser
        browser.close()


@contextlib.contextmanager
def serving(*runs: Path | str, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """`penstock view` of these runs; its URL."""
    command = [sys.executable, "-P", "-m", "penstock_launch", "view", *map(str, runs), "--port", "0"]
    variables = {**os.environ, **(environment or {})}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=variables) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.match(r"(http://\S+) shows", line)
            assert found, line
            yield found[1]
        finally:
            process.terminate()
    assert process.returncode == 0


@dataclass
class Viewer:
    """A page of one server, and what went wrong in it."""

    page: Page
    url: str
    faults: list[str]

    def open(self, address: str = "") -> None:
        """Open an address of the page, such as `?view=steps`, and wait for its content."""
        self.page.goto(f"{self.url}/{address}")
        self.settle()

    def click(self, what: Locator) -> None:
        """Click, and wait for the content that follows."""
        what.click()
        self.settle()

    def settle(self) -> None:
        """Wait until the content that was asked for is there."""
        self.page.locator("main:not([aria-busy]) >> :is(h1, form.login, .problem)").first.wait_for()

    def table(self, name: str) -> list[list[str]]:
        """The cells of a table, by row."""
        rows = self.page.get_by_role("region", name=name).locator("tbody tr").all()
        return [[cell.inner_text().strip() for cell in row.locator("td").all()] for row in rows]


@contextlib.contextmanager
def viewing(browser: Browser, url: str, *, scheme: Scheme = "light", width: int = 1280) -> Iterator[Viewer]:
    """A page of a server, in a context of its own."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if scheme == "dark" else "light"
    )
    page = context.new_page()
    page.set_default_timeout(ANSWER_SECONDS * 1000)
    viewer = Viewer(page, url, [])
    host = urlsplit(url).netloc
    page.on("request", lambda request: _note_foreign(viewer.faults, request.url, host))
    page.on("pageerror", lambda error: viewer.faults.append(f"script: {error}"))
    page.on("console", lambda said: _note_error(viewer.faults, said.type, said.text))
    yield viewer
    context.close()
    assert viewer.faults == []


def _note_foreign(faults: list[str], url: str, host: str) -> None:
    parts = urlsplit(url)
    if parts.scheme in ("http", "https", "ws", "wss") and parts.netloc != host:
        faults.append(f"request to {url}")


def _note_error(faults: list[str], kind: str, text: str) -> None:
    if kind == "error" and not text.startswith(REFUSED):
        faults.append(f"console: {text}")
