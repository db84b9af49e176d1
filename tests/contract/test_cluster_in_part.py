"""A cluster one of whose primaries is gone, without a replica to take over: the others' users are served."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from bench.rig.cluster import ValkeyCluster, ask
from bench.rig.processes import standing_still, wait_until
from bench.rig.valkey import DURABLE
from server.errors import Unavailable
from server.store.durability import Durability
from server.store.redis.profiles import RedisProfiles
from tests.support.stored import change, connected, users_at

READS = 200
"""More than there are places for, on one connection of the stores."""


@pytest.fixture
def lenient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    """Three primaries that go on when one is gone."""
    options = (*DURABLE, "--cluster-require-full-coverage", "no")
    running = ValkeyCluster(tmp_path_factory.mktemp("lenient"), options).start()
    yield running
    running.kill()


@pytest.mark.parametrize("silent", [False, True], ids=["killed", "silent"])
async def test_who_lives_elsewhere_is_served(lenient: ValkeyCluster, *, silent: bool) -> None:
    gone, there = lenient.primaries[1], lenient.primaries[2]
    lost, served = next(users_at(lenient, gone)), next(users_at(lenient, there))
    async with connected(lenient.url) as connection:
        store = RedisProfiles(connection)
        assert connection.unserved is None
        with standing_still(*([gone.pid] if silent else [])):
            if not silent:
                gone.kill()
            assert await connection.check() is Durability.ALWAYS
            assert "33% of all users cannot be served" in str(connection.unserved)
            assert f"127.0.0.1:{gone.port}" in str(connection.unserved)
            reading = [asyncio.create_task(store.load(lost)) for _ in range(READS)]
            writing = [asyncio.create_task(store.commit(lost, b"", change("a"))) for _ in range(READS)]
            await asyncio.sleep(0)
            assert await store.commit(served, b"", change("a"))
            assert await store.load(served) is not None
            refused = await asyncio.gather(*reading, *writing, return_exceptions=True)
            assert {error.code for error in refused if isinstance(error, Unavailable)} == {"store_unavailable"}
            assert all(isinstance(error, Unavailable) for error in refused)
        if not silent:
            gone.start()
        wait_until(lambda: all(ask(node, "CLUSTER INFO")["cluster_state"] == "ok" for node in lenient.nodes), "peace")
        await connection.check()
        assert connection.unserved is None
        assert await store.commit(lost, b"", change("a"))


async def test_a_cluster_that_serves_less_than_half_is_not_usable(lenient: ValkeyCluster) -> None:
    async with connected(lenient.url) as connection:
        for gone in lenient.primaries[:2]:
            gone.kill()
        with pytest.raises(Unavailable, match="cannot be used"):
            await connection.check()


async def test_a_cluster_that_serves_nobody_once_a_primary_is_gone_is_not_usable(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """As servers do by default: those that are left answer, and refuse every key."""
    strict = ValkeyCluster(tmp_path_factory.mktemp("strict")).start()
    try:
        async with connected(strict.url) as connection:
            strict.primaries[1].kill()
            left = strict.primaries[0], strict.primaries[2]
            wait_until(lambda: all(ask(node, "CLUSTER INFO")["cluster_state"] == "fail" for node in left), "it to fail")
            with pytest.raises(Unavailable, match="cannot be used"):
                await connection.check()
    finally:
        strict.kill()
