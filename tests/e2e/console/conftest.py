"""One running server over the demo's bank, and one browser, for all that is tested of the console."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from bench.rig.up import Up, up
from deploy.console.browser import PATIENCE_MS, Looking, chromium, looking, running_browser
from deploy.demo.personas import PEOPLE
from mta_client import Client

expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")  # of the one module there is: asyncio is not to be had while it runs
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    executable = chromium()
    if executable is None:
        pytest.skip("this machine has no Chromium: `deploy/setup.sh tools` installs it where it can")
    with running_browser(executable) as started:
        yield started


@pytest.fixture(scope="module")
def machine(
    browser: Browser, demo_bank: Path, embedder_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Up]:
    """`mta up` over the demo's bank, where the demo's three people are known."""
    settings = {"MTA_EMBEDDER": str(embedder_folder)}
    with up(tmp_path_factory.mktemp("console") / "data", "--bank", str(demo_bank), environment=settings) as started:
        with Client(started.url, trust_env=False) as client:
            for person in PEOPLE:
                client.put_profile(person.user_id, person.lines)
        yield started


@pytest.fixture
def api(machine: Up) -> Iterator[Client]:
    """The server's API."""
    with Client(machine.url, trust_env=False) as client:
        yield client


@pytest.fixture
def look(browser: Browser, machine: Up) -> Iterator[Looking]:
    """A page of the console that complains about nothing and asks nobody else; it may be refused things."""
    with looking(browser, machine.url) as looker:
        yield looker
        assert looker.faults == []
        assert looker.foreign == []
