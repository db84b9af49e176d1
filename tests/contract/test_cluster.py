"""What only a cluster can do wrong: the stores' other suites are held against it as they are."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import numpy as np
import pytest
import redis.asyncio as redis
from redis.crc import key_slot

from adapters.errors import MtaError
from bench.rig.cluster import ValkeyCluster, ask
from bench.rig.processes import standing_still, wait_until
from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable
from server.store.durability import Durability
from server.store.jobs import JobState, Trained
from server.store.profiles import Change, Profile, StoredItem
from server.store.redis import job_scripts, keys
from server.store.redis import profiles as profile_scripts
from server.store.redis.jobs import RedisJobs
from server.store.redis.profiles import RedisProfiles
from server.store.redis.servers.append_only_file import AppendOnlyFile
from server.store.redis.servers.cluster import Cluster
from server.store.redis.servers.connection import RedisConnection
from tests.support.store_parts import EMBEDDER, KEYS, claimed, submitted

LATER_MS = 1 << 52
SECRET = "words that nobody shall find again"
_numbers = itertools.count()


@pytest.fixture
async def connection(cluster: ValkeyCluster) -> AsyncIterator[RedisConnection]:
    async with opened(cluster) as connection:
        yield connection


@asynccontextmanager
async def opened(cluster: ValkeyCluster) -> AsyncIterator[RedisConnection]:
    connection = RedisConnection(cluster.url)
    await connection.check()
    yield connection
    await connection.close()


def users_at(cluster: ValkeyCluster, home: ValkeyProcess) -> Iterator[str]:
    """Keys of users whom no other test knows, and whom one of the primaries holds."""
    for number in _numbers:
        key = KEYS.key(f"user-of-a-cluster-{number}")
        if cluster.home_of(keys.profile(key)) is home:
            yield key


def change(text: str) -> Change:
    profile = Profile("somebody", 1, 1, EMBEDDER, np.ones(4, "f4") / 2)
    return Change(profile, {"it": StoredItem(0, {"text": text})}, {}, ())


@contextmanager
def configured(node: ValkeyProcess, name: str, value: str) -> Iterator[None]:
    """A node with another setting, until the block ends."""
    before = ask(node, "CONFIG GET", name)[name]
    ask(node, "CONFIG SET", name, value)
    try:
        yield
    finally:
        ask(node, "CONFIG SET", name, before)
    wait_until(lambda: not rewriting(node), "the file that it begins anew")


def rewriting(node: ValkeyProcess) -> bool:
    """Whether a node rewrites its file, or is about to."""
    info = ask(node, "INFO", "persistence")
    return bool(info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"])


def calls(node: ValkeyProcess, command: str) -> int:
    """How often a command was called."""
    return int(ask(node, "INFO", "commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("appendonly", "no", None),
        ("appendfsync", "no", None),
        ("appendfsync", "everysec", Durability.WAITAOF),
    ],
)
async def test_one_primary_decides_how_durable_all_are(
    cluster: ValkeyCluster, name: str, value: str, expected: Durability | None, caplog: pytest.LogCaptureFixture
) -> None:
    weak = cluster.primaries[1]
    strict, lenient = RedisConnection(cluster.url), RedisConnection(cluster.url, require_durable=False)
    with configured(weak, name, value):
        if expected:
            assert await strict.check() is expected
        else:
            with pytest.raises(Unavailable, match="appendonly yes"):
                await strict.check()
            with pytest.raises(Unavailable, match="appendonly yes"):  # wherever the user is
                await RedisProfiles(strict).commit(next(users_at(cluster, cluster.primaries[0])), b"", change("a"))
            assert f":{weak.port}" in caplog.text
            assert await lenient.check() is Durability.NONE
            assert await RedisProfiles(lenient).commit(next(users_at(cluster, weak)), b"", change("a"))
    await strict.close()
    await lenient.close()


async def test_a_primary_that_no_longer_keeps_what_it_acknowledges_acknowledges_nothing(
    cluster: ValkeyCluster, connection: RedisConnection
) -> None:
    """Before anybody has looked again: a replica without a file may have taken over."""
    weak = cluster.primaries[2]
    with configured(weak, "appendonly", "no"), pytest.raises(Unavailable):
        await RedisProfiles(connection).commit(next(users_at(cluster, weak)), b"", change("a"))


async def test_a_write_waits_for_the_disk_over_the_connection_that_wrote(
    cluster: ValkeyCluster, connection: RedisConnection
) -> None:
    for home in cluster.primaries:
        key = next(users_at(cluster, home))
        async with redis.from_url(home.url) as raw, raw.monitor() as monitor:
            assert await RedisProfiles(connection).commit(key, b"", change("a"))
            seen = monitor.listen()
            async with asyncio.timeout(10):
                heard = [await anext(seen)]
                while not heard[-1]["command"].startswith("WAITAOF"):
                    heard.append(await anext(seen))
        (wrote,) = [one for one in heard if one["command"].startswith("EVAL")]
        assert key in wrote["command"]
        assert wrote["client_port"] == heard[-1]["client_port"]


async def test_a_user_whose_keys_move_is_read_and_written_all_the_while(
    cluster: ValkeyCluster, connection: RedisConnection
) -> None:
    source, target, other = cluster.primaries
    here, there = (ask(node, "CLUSTER MYID").decode() for node in (source, target))
    key, store = next(users_at(cluster, source)), RedisProfiles(connection)
    slot = key_slot(keys.profile(key).encode())
    async with opened(cluster) as unaware:
        ask(target, f"CLUSTER SETSLOT {slot} IMPORTING {here}")
        ask(source, f"CLUSTER SETSLOT {slot} MIGRATING {there}")
        await connection.write("return redis.call('RPUSH', KEYS[1], 'a')", (keys.samples(key),))
        assert ask(target, f"CLUSTER COUNTKEYSINSLOT {slot}") == 1  # asked for at the one, written at the other
        # A script on several keys waits for the move to end: no server can tell which of them it has yet.
        writing = asyncio.create_task(store.commit(key, b"", change("a")))
        while not calls(target, "asking") > 1:
            await asyncio.sleep(0.02)
        assert not writing.done()
        for node in (target, source, other):
            ask(node, f"CLUSTER SETSLOT {slot} NODE {there}")
        assert await writing
        assert await RedisProfiles(unaware).load(key) is not None
        assert await RedisProfiles(unaware).erase(key, LATER_MS, 0)
        assert await connection.holders(keys.profile(key)) == [there]
    cluster.move(slot, target, source)


async def test_what_was_erased_leaves_the_file_of_the_server_that_held_it(
    cluster: ValkeyCluster, connection: RedisConnection, quick_rewrites: None
) -> None:
    home, file, store = cluster.primaries[1], AppendOnlyFile(connection), RedisProfiles(connection)
    others = [node for node in cluster.nodes if node is not home]
    key = next(users_at(cluster, home))
    before = [rewrites(node) for node in others]
    await store.commit(key, b"", change(SECRET))
    asked = await file.ask_for_rewrite(key)
    assert await store.erase(key, asked.erase_by_ms, asked.rewritten_by_ms)
    assert on_disk(home)
    async with asyncio.timeout(30):
        while on_disk(home):
            await file.look()
            await asyncio.sleep(0.05)
    assert [rewrites(node) for node in others] == before


def on_disk(node: ValkeyProcess) -> bool:
    return any(SECRET.encode() in path.read_bytes() for path in node.folder.rglob("*.aof"))


def rewrites(node: ValkeyProcess) -> int:
    return int(ask(node, "INFO", "persistence")["aof_rewrites"])


@pytest.mark.parametrize("url", ["redis+cluster://", "redis+cluster://a,,b", "redis+cluster://a:7000/3", "redis+c://a"])
async def test_what_is_no_url_of_a_cluster_is_refused(url: str) -> None:
    with pytest.raises(MtaError, match="MTA_REDIS_URL"):
        RedisConnection(url)


async def test_a_url_names_hosts_a_login_and_how_to_encrypt() -> None:
    client = Cluster("rediss+cluster://me:s%40cret@one:7000,two?ssl_check_hostname=false")._client
    assert sorted(client.nodes_manager.startup_nodes) == ["one:7000", "two:6379"]
    kept = client.connection_kwargs
    assert (kept["username"], kept["password"]) == ("me", "s@cret")
    assert kept["connection_class"].__name__ == "SSLConnection"


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    """Three primaries, the first of which has a replica."""
    running = ValkeyCluster(tmp_path_factory.mktemp("followed"), replicas=1).start()
    yield running
    running.kill()


async def test_a_write_that_no_replica_has_received_is_not_acknowledged(
    followed: ValkeyCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.store.redis.servers.cluster.REPLICA_TIMEOUT_MS", 100)
    users = users_at(followed, followed.primaries[0])
    async with opened(followed) as connection:
        store = RedisProfiles(connection)
        assert await store.commit(next(users), b"", change("a"))
        with standing_still(followed.replicas[0].pid):
            with pytest.raises(Unavailable, match="on a replica"):
                await store.commit(next(users), b"", change("a"))
            elsewhere = next(users_at(followed, followed.primaries[1]))
            assert await store.commit(elsewhere, b"", change("a"))


class Repeatable(RedisConnection):
    """Remembers what was written, by script."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.written = dict[str, tuple[Any, ...]]()

    async def write(self, script: str, names: Sequence[str], *arguments: Any) -> Any:
        self.written[script] = (names, *arguments)
        return await super().write(script, names, *arguments)


async def test_what_is_sent_again_is_not_acknowledged_before_a_replica_has_it_either(
    followed: ValkeyCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server waits for what a connection wrote: for nothing, if all is already as it should be."""
    monkeypatch.setattr("server.store.redis.servers.cluster.REPLICA_TIMEOUT_MS", 100)
    users = users_at(followed, followed.primaries[0])
    user, erased = next(users), next(users)
    connection = Repeatable(followed.url)
    await connection.check()
    profiles, jobs = RedisProfiles(connection), RedisJobs(connection)
    await profiles.commit(user, b"", change("a"))
    await profiles.settle(user)
    await profiles.erase(erased, LATER_MS, 0)
    lease = await claimed(jobs, (await submitted(jobs, user)).id)
    await jobs.end(lease, Trained(JobState.REJECTED, 1.0, 1.0))
    await jobs.cancel((await submitted(jobs, user)).id)
    await submitted(jobs, user)
    said = {
        "commit": profile_scripts._COMMIT,
        "settle": profile_scripts._AGAIN,
        "erase": profile_scripts._ERASE,
        "submit": job_scripts.SUBMIT,
        "cancel": job_scripts.CANCEL,
        "end": job_scripts.END,
    }
    acknowledged = []
    for name, script in said.items():
        with standing_still(followed.replicas[0].pid):  # one by one: it must not be counted as failed
            try:
                await connection.write(script, *connection.written[script])
            except Unavailable as error:
                assert "on a replica" in str(error)
            else:
                acknowledged.append(name)
    assert acknowledged == []
    await connection.close()


async def test_replicas_that_a_redirection_made_the_client_forget_are_found_again(followed: ValkeyCluster) -> None:
    async with opened(followed) as connection:
        slots = connection._servers._client.nodes_manager.slots_cache  # type: ignore[attr-defined]
        slots[1] = slots[1][:1]  # what redis-py makes of a slot when a read is sent elsewhere
        await connection.check()
        slots = connection._servers._client.nodes_manager.slots_cache  # type: ignore[attr-defined]
        assert [len(slots[slot]) for slot in (0, 1, 2)] == [2, 2, 2]


@pytest.mark.parametrize("silent", [False, True], ids=["killed", "silent"])
async def test_what_was_acknowledged_is_there_after_a_replica_took_over(
    followed: ValkeyCluster, monkeypatch: pytest.MonkeyPatch, *, silent: bool
) -> None:
    """What was sent meanwhile was written after a while, or refused."""
    monkeypatch.setattr("server.store.redis.servers.connection.WRITE_TIMEOUT_S", 3.0)
    monkeypatch.setattr("server.store.redis.servers.cluster.LAYOUT_S", 1.0)
    pair = (followed.primaries[0], followed.replicas[0])
    (lost,) = [node for node in pair if ask(node, "ROLE")[0] == b"master"]
    tried, written, refused = dict[str, int](), dict[str, int](), list[Unavailable]()
    users = list(itertools.islice(users_at(followed, followed.primaries[0]), 4))

    enough = False

    async def write(store: RedisProfiles, user: str) -> None:
        while not enough:
            tried[user] = number = tried.get(user, 0) + 1
            try:
                snapshot = await store.read(user)
                assert await store.commit(user, snapshot.version, change(str(number)), snapshot.epoch)
            except Unavailable as error:
                refused.append(error)
                await asyncio.sleep(0.05)
            else:
                written[user] = number

    async with opened(followed) as connection, asyncio.timeout(120):
        store = RedisProfiles(connection)
        writing = [asyncio.create_task(write(store, user)) for user in users]
        try:
            for name in ("before", "after"):
                seen = dict(written)
                while not all(written.get(user, 0) > seen.get(user, 0) + 10 for user in users):
                    ended = [task for task in writing if task.done()]
                    assert not ended, ended
                    await asyncio.sleep(0.02)
                if name == "before":
                    os.kill(lost.pid, signal.SIGSTOP) if silent else lost.kill()
        finally:
            enough = True
        await asyncio.gather(*writing)  # to their ends: what is acknowledged during a read need not be in its answer
        for user in users:
            found = int((await store.read(user)).items["it"].fields["text"])
            assert written[user] <= found <= tried[user]
        assert {error.code for error in refused} <= {"store_unavailable", "store_not_durable"}
        if silent:
            os.kill(lost.pid, signal.SIGCONT)
            return
        lost.start()
        while not all(map(followed.lists_replicas, followed.nodes)):
            await asyncio.sleep(0.1)
        assert len(await connection.holders(keys.profile(users[0]))) == 2
        assert await connection.check() is Durability.ALWAYS
