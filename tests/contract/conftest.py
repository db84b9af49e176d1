"""The servers that every store is held against, the stores of a process over one, and a user who moves in it."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis.asyncio as redis
from hypothesis import settings

from bench.rig.valkey import DURABLE, ValkeyProcess, server_binaries
from server.store import append_only_file
from server.store.feedback import Feedback
from server.store.jobs import JobStore
from server.store.redis import keys
from server.store.rotation import Rotation
from server.store.samples import Sample, encode_sample
from server.store.tallies import Counts
from server.store.tenants.user_key import User
from tests.support.moving import BOTH, CELL, SECRETS, WORDS
from tests.support.store_parts import KEYS, TENANT, StoreParts, WorkerSteps, change, stored, submitted
from tests.support.valkeys.cluster import ValkeyCluster

_numbers = itertools.count()
settings.register_profile("long")  # `test_store_model.py` reads which profile was asked for


@pytest.fixture(scope="session")
def cluster(memory: Path) -> Iterator[ValkeyCluster]:
    """Three primaries without replicas."""
    running = ValkeyCluster(memory / "cluster").start()
    yield running
    running.kill()


@pytest.fixture(scope="session")
def each_server(memory: Path) -> Iterator[dict[str, ValkeyProcess]]:
    """The packaged Valkey, and Redis where it is installed."""
    binaries = server_binaries().items()
    servers = {name: ValkeyProcess(memory / f"each-{name}", DURABLE, file) for name, file in binaries}
    with ExitStack() as stack:
        yield {name: stack.enter_context(server) for name, server in servers.items()}


@pytest.fixture(params=sorted(server_binaries()))
def one_server(request: pytest.FixtureRequest, each_server: dict[str, ValkeyProcess]) -> ValkeyProcess:
    return each_server[request.param]


@pytest.fixture(params=[*sorted(server_binaries()), "cluster"])
def server(request: pytest.FixtureRequest, each_server: dict[str, ValkeyProcess]) -> ValkeyProcess | ValkeyCluster:
    return request.getfixturevalue("cluster") if request.param == "cluster" else each_server[request.param]


@pytest.fixture
def nodes(server: ValkeyProcess | ValkeyCluster) -> list[ValkeyProcess]:
    return [server] if isinstance(server, ValkeyProcess) else server.nodes


@pytest.fixture
async def raw(server: ValkeyProcess | ValkeyCluster) -> AsyncIterator[redis.Redis]:
    """A client of the server, which holds nothing at first."""
    async with server.client() as raw:
        await raw.flushall()
        yield raw


@pytest.fixture
async def parts(server: ValkeyProcess | ValkeyCluster, raw: redis.Redis) -> AsyncIterator[StoreParts]:
    """The stores of one process, over that server."""
    async with StoreParts.opened(server.url) as parts:
        yield parts


@pytest.fixture
def jobs(parts: StoreParts) -> JobStore:
    return parts.jobs


@pytest.fixture
def user() -> str:
    return KEYS.key(f"user-{next(_numbers)}")


@pytest.fixture
def quick_rewrites(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"INTERVAL_MS": 800, "ERASE_MS": 200, "CLOCK_SKEW_MS": 0, "REWRITE_MS": 500, "REWRITE_CHECK_S": 0.05}
    for name, value in quick.items():
        monkeypatch.setattr(append_only_file, name, value)


@pytest.fixture
def moving(parts: StoreParts) -> Rotation:
    return Rotation(parts.connection, SECRETS)


@pytest.fixture
async def begun(moving: Rotation) -> Rotation:
    await moving.check()
    await moving.begin()
    return moving


@pytest.fixture
def someone(server: ValkeyProcess | ValkeyCluster) -> User:
    """A user whose two keys are on two servers, if there are several."""
    for number in range(1000):
        user = BOTH.user(f"someone-{number}")
        homes = [server.home_of(keys.profile(key)) if isinstance(server, ValkeyCluster) else key for key in user.keys]
        if homes[0] != homes[1]:
            return user
    raise AssertionError


@pytest.fixture
async def old(parts: StoreParts, someone: User) -> str:
    """The old key of a user of whom everything is stored that can be."""
    key = someone.keys[1]
    assert await stored(parts.profiles, key, change("abc", user_id=someone.id))
    await submitted(parts.jobs, key, encode_sample(Sample([], WORDS)).decode())
    worker = WorkerSteps(parts)
    await worker.take()
    await worker.claim()
    assert await worker.promote()
    await parts.feedback.add(key, "gen-1", Feedback("base", "none"), Sample([], WORDS), "")
    assert await parts.tallies.add(key, "", {CELL: Counts(answers=1)})
    await parts.holdings.note(TENANT, {key: (await parts.profiles.measure(key))[1]})
    await parts.tallies.add_people(CELL.week, TENANT, [key])
    return key
