"""The servers that every store is held against."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.support.valkey import DURABLE, ValkeyProcess, server_binaries

settings.register_profile("long")  # `test_store_model.py` reads which profile was asked for


@pytest.fixture(scope="module", params=sorted(server_binaries()))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyProcess]:
    """The packaged Valkey, and Redis where it is installed."""
    running = ValkeyProcess(tmp_path_factory.mktemp(request.param), DURABLE, server_binaries()[request.param]).start()
    yield running
    running.kill()
