"""A local headless Chromium, and a page of the console whose errors are recorded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from playwright.sync_api import Browser, ConsoleMessage, Dialog, Page, Request, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1440, 900
PATIENCE_MS = 60_000
TRAINING_MS = 300_000
"""Timeout for a training; the engine shares its cores with other processes."""


def chromium() -> Path | None:
    """Return the path of the machine's Chromium, if it has one."""
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    return Path(program) if program else None


@contextmanager
def running_browser(executable: Path) -> Iterator[Browser]:
    """Run a browser; the thread cannot use asyncio until the block ends."""
    # Chromium's sandbox needs a user other than root.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=options)
        try:
            yield browser
        finally:
            browser.close()


@dataclass(slots=True)
class Looking:
    """A browser page on a console.

    Attributes:
        url: URL of the gateway.
        page: the browser's page.
        faults: errors of the page: console errors, exceptions and dialogs.
        refusals: 4xx and 5xx statuses of its requests, which the browser's console also reports as errors.
        foreign: requested addresses outside the gateway.
    """

    url: str
    page: Page
    faults: list[str] = field(default_factory=list)
    refusals: list[int] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def visit(self, page_name: str, **params: Any) -> Page:
        """Load a page of the console anew."""
        self.page.goto("about:blank")
        query = f"?{urlencode(params)}" if params else ""
        self.page.goto(f"{self.url}/console#/{page_name}{query}")
        self.page.get_by_role("heading", level=1).wait_for()
        return self.page


@contextmanager
def looking(browser: Browser, url: str) -> Iterator[Looking]:
    """Open a new page with its own clipboard."""
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}, locale="en-GB")
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
    context.set_default_timeout(PATIENCE_MS)
    look = Looking(url, context.new_page())
    page = look.page

    def asked(request: Request) -> None:
        if not request.url.startswith((f"{url}/", "data:", "blob:", "about:")):
            look.foreign.append(request.url)

    def dismissed(dialog: Dialog) -> None:
        look.faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def complained(said: ConsoleMessage) -> None:
        if said.type in ("error", "warning") and not said.text.startswith("Failed to load resource"):
            look.faults.append(f"{said.type}: {said.text}")

    page.on("request", asked)
    page.on("response", lambda answer: look.refusals.append(answer.status) if answer.status >= 400 else None)
    page.on("pageerror", lambda error: look.faults.append(f"exception: {error}"))
    page.on("dialog", dismissed)
    page.on("console", complained)
    try:
        yield look
    finally:
        context.close()
