"""The demo's own bank behind a real server, started once for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.demo.bank import build_bank
from deploy.demo.personas import PEOPLE, anchors
from deploy.demo.server import running_server
from mta_client import Client


@pytest.fixture(scope="session")
def demo_bank() -> Path:
    """The bank that `make demo` builds; trained here only when it is not there yet."""
    return build_bank(anchors())


@pytest.fixture(scope="session")
def demo_api(demo_bank: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """`mta up` over that bank, where the demo's three people are known."""
    with running_server(demo_bank, tmp_path_factory.mktemp("demo") / "data", print) as server:
        for person in PEOPLE:
            server.api.put_profile(person.user_id, person.lines)
        yield server.api
