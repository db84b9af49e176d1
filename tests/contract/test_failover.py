"""Behind one address another server: what was the primary is a replica now, or is gone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.rig.cluster import ask
from bench.rig.processes import wait_until
from bench.rig.proxy import LossyProxy
from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable
from server.store.durability import Durability
from server.store.redis.profiles import RedisProfiles
from tests.support.stored import change, connected, strict_and_lenient


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[ValkeyProcess, ValkeyProcess]]:
    """A primary, and a replica that has all it has."""
    primary, replica = (ValkeyProcess(tmp_path / name).start() for name in ("primary", "replica"))
    ask(replica, "REPLICAOF", "127.0.0.1", primary.port)
    wait_until(lambda: ask(replica, "ROLE")[3] == b"connected", "the replica to follow")
    yield primary, replica
    primary.kill()
    replica.kill()


def fail_over(primary: ValkeyProcess, replica: ValkeyProcess) -> None:
    """They change places; connections stay open."""
    ask(primary, "FAILOVER", "TO", "127.0.0.1", replica.port)
    wait_until(lambda: ask(primary, "ROLE")[0] == b"slave", "the replica to take over")


async def test_a_write_that_meets_a_replica_goes_to_whoever_has_the_address_now(
    pair: tuple[ValkeyProcess, ValkeyProcess], user: str
) -> None:
    primary, replica = pair
    with LossyProxy(primary.port) as address:
        async with connected(f"redis://127.0.0.1:{address.port}") as connection:
            store = RedisProfiles(connection)
            assert await store.commit(user, b"", change("a"))
            fail_over(primary, replica)
            address.to_port = replica.port
            snapshot = await store.read(user)  # of the old one: its connection stands
            assert await store.commit(user, snapshot.version, change("b"))
            assert list((await store.read(user)).items) == ["a", "b"]


async def test_a_look_that_meets_a_replica_leaves_no_connection_to_it(
    pair: tuple[ValkeyProcess, ValkeyProcess],
) -> None:
    primary, replica = pair
    with LossyProxy(primary.port) as address:
        async with connected(f"redis://127.0.0.1:{address.port}") as connection:
            fail_over(primary, replica)
            address.to_port = replica.port
            assert await connection.check() is Durability.ALWAYS
            info = await connection.run(lambda redis: redis.info("server"))
            assert info["tcp_port"] == replica.port


async def test_a_replica_is_no_store_until_it_takes_writes(
    pair: tuple[ValkeyProcess, ValkeyProcess], user: str
) -> None:
    primary, replica = pair
    async with strict_and_lenient(replica.url) as (connection, _):
        with pytest.raises(Unavailable) as caught:
            await connection.check()
        assert caught.value.code == "store_unavailable"
        assert f"it is a replica of 127.0.0.1:{primary.port}" in caught.value.explained
        ask(replica, "REPLICAOF", "NO", "ONE")
        assert await connection.check() is Durability.ALWAYS
        assert await RedisProfiles(connection).commit(user, b"", change("a"))
