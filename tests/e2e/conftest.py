"""The demo on a terminal and one browser: one server with the real model for all tests here."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from bench.rig.processes import command_line, descendants
from demo.answers import DemoAnswer, ask
from demo.personas import NOBODY, PEOPLE, QUESTIONS
from deploy.console.browser import PATIENCE_MS, Looking, looking
from mta_client import Client
from tests.support.terminal import Terminal, terminal

DEMO = (sys.executable, "-m", "server.cli", "demo", "--data")
ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 2400.0  # the bank may have to be built, beside other tests, on a slow machine

expect.set_options(timeout=PATIENCE_MS)


@dataclass(frozen=True)
class Demo:
    """A demo that has shown everything and stays up."""

    terminal: Terminal
    shown: str  # from the answers on
    url: str  # of its server
    data: Path  # its folder

    @property
    def pid(self) -> int:
        return self.terminal.process.pid

    def engine(self) -> int:
        """The pid of the engine's API process."""
        commands = {pid: command_line(pid) for pid in descendants(self.pid)}
        return next(
            pid for pid, command in commands.items() if "-m server.engine " in command and "guard" not in command
        )


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """`make demo`; the bank is trained here only if the cache has none."""
    data = tmp_path_factory.mktemp("demo") / "data"
    with terminal([*DEMO, str(data)], ROOT) as screen:
        shown = screen.wait_for(r"(?s)\[5/6\](.*)Ctrl-C stops everything", PATIENCE_S)[1]
        url = re.search(r"The server stays up at (http://\S+)", shown)
        assert url, shown
        yield Demo(screen, shown, url[1], data)


@pytest.fixture(scope="session")
def api(demo: Demo) -> Iterator[Client]:
    with Client(demo.url, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def answers(api: Client) -> dict[str, list[DemoAnswer]]:
    """User id → greedy answers to the five questions; of the people as they are without any training."""
    users = {NOBODY: NOBODY} | {person.user_id: f"another-{person.user_id}" for person in PEOPLE}
    for person in PEOPLE:
        api.put_profile(users[person.user_id], person.lines)
    with ThreadPoolExecutor(len(users)) as pool:  # all of them at once: their tokens share the engine's steps
        said = {name: [pool.submit(ask, api, user, asked) for asked in QUESTIONS] for name, user in users.items()}
        return {name: [answer.result() for answer in waiting] for name, waiting in said.items()}


@pytest.fixture(scope="module")
def people(api: Client) -> None:
    """The demo's three people, without the adapter that the demo trains for one of them."""
    for person in PEOPLE:
        api.forget(person.user_id)
        api.put_profile(person.user_id, person.lines)


@pytest.fixture
def look(browser: Browser, demo: Demo, people: None) -> Iterator[Looking]:
    """A page of the console that complains about nothing and asks nobody else; it may be refused things."""
    with looking(browser, demo.url) as looker:
        yield looker
        assert looker.faults == []
        assert looker.foreign == []
