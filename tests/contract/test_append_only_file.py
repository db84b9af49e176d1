"""What was erased leaves the store's file on disk by the time that was promised, whoever dies meanwhile."""

from __future__ import annotations

import asyncio
import random
import resource
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from redis.asyncio import Redis

from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable
from server.store import append_only_file
from server.store.append_only_file import AppendOnlyFile
from server.store.redis.servers.base import StoreServer
from server.store.redis.servers.connection import RedisConnection
from tests.support.store_parts import connected, on_disk

SECRET = "words that nobody shall find again"
STATE = "mta:{rewrite}"


@dataclass
class Disk:
    """A server that was told a secret, and a gateway that looks after its file."""

    server: ValkeyProcess
    raw: Redis
    connection: RedisConnection
    file: AppendOnlyFile

    async def looked(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            await self.file.rewrite_if_due()
            await asyncio.sleep(0.02)

    async def time_of(self, field: str) -> int:
        return int(await self.raw.hget(STATE, field) or 0)

    async def until_forgotten(self) -> None:
        await self.raw.delete("secret")
        async with asyncio.timeout(30):
            while await self.raw.hexists(STATE, "first") or await self.raw.hexists(STATE, "due"):
                await self.looked(0.1)
        assert not on_disk(SECRET, self.server)

    async def until_overdue(self, told: str, caplog: pytest.LogCaptureFixture) -> int:
        """Look until the file is overdue; how many failures were told by then."""
        async with asyncio.timeout(60):
            while not await self.file.overdue_s():
                await self.looked(0.05)
        return sum(told in line for line in caplog.messages)

    async def rewrites(self) -> int:
        return int((await self.raw.info("persistence"))["aof_rewrites"])


@pytest.fixture
async def disk(one_server: ValkeyProcess, quick_rewrites: None) -> AsyncIterator[Disk]:
    async with Redis.from_url(one_server.url) as raw, connected(one_server.url) as connection:
        await raw.flushall()
        await raw.set("secret", SECRET)
        yield Disk(one_server, raw, connection, AppendOnlyFile(connection))


async def test_without_an_erasure_no_file_is_rewritten(disk: Disk) -> None:
    before = await disk.rewrites()
    await disk.looked(0.3)
    assert await disk.rewrites() == before
    assert await disk.file.overdue_s() == 0


async def test_what_expires_later_is_left_out_by_a_rewrite_after_that(disk: Disk) -> None:
    began_ms = (await disk.file.announce("a user")).erase_by_ms - append_only_file.ERASE_MS
    await disk.file.announce_expiry(600)
    await disk.file.announce("another user")
    await disk.until_forgotten()
    assert await disk.time_of("last") >= began_ms + 600


async def test_what_was_erased_is_gone_by_the_time_that_was_promised(disk: Disk) -> None:
    asked = await disk.file.announce("a user")
    assert on_disk(SECRET, disk.server)
    await disk.until_forgotten()
    assert asked.erase_by_ms <= await disk.time_of("last") <= asked.rewritten_by_ms
    assert await disk.file.overdue_s() == 0


async def test_a_rewrite_that_began_before_the_erasure_settles_nothing(disk: Disk) -> None:
    await disk.file.announce("a user")
    await disk.file.rewrite_if_due()
    asked = await disk.file.announce("a user")
    while not await disk.time_of("last"):
        await disk.looked(0.05)
    assert await disk.time_of("last") < asked.erase_by_ms
    await disk.until_forgotten()


@pytest.mark.parametrize("dies", ["gateway", "server"])
async def test_a_rewrite_is_begun_again_when_somebody_died_over_it(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    send = disk.connection.send

    async def dying(server: StoreServer, *command: str) -> object:
        if command == ("BGREWRITEAOF",):
            raise Unavailable("it died before")
        return await send(server, *command)

    await disk.file.announce("a user")
    await disk.raw.delete("secret")
    await asyncio.sleep(0.25)
    with monkeypatch.context() as patched:
        if dies == "gateway":
            patched.setattr(disk.connection, "send", dying)
        await disk.file.rewrite_if_due()
    assert await disk.time_of("tried")
    if dies == "server":
        disk.server.kill()
        disk.server.start()
        await disk.raw.connection_pool.disconnect()
    await disk.until_forgotten()


async def test_once_the_clock_was_set_back_the_last_rewrite_is_none(disk: Disk) -> None:
    await disk.raw.hset(STATE, mapping={"last": 1 << 52, "tried": 1 << 52, "before": "someone 0"})
    asked = await disk.file.announce("a user")
    await disk.until_forgotten()
    assert await disk.time_of("last") <= asked.rewritten_by_ms


async def test_what_the_version_before_had_to_rewrite_is_rewritten(disk: Disk) -> None:
    now_ms = time.time_ns() // 1_000_000
    await disk.raw.hset(STATE, mapping={"asked": now_ms, "due": now_ms + 3_000_000, "last": now_ms - 7_000})
    await disk.until_forgotten()


@contextmanager
def files_at_most(server: ValkeyProcess, size: int) -> Iterator[None]:
    """Let the server and its children write no file beyond a size, until the block ends; who tries dies."""
    before = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, before)


async def test_a_failing_rewrite_is_told_and_tried_again(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    await disk.raw.set("much", random.randbytes(2 << 20))
    before = await disk.rewrites()
    await disk.raw.bgrewriteaof()  # what the server appends to is short from here on
    async with asyncio.timeout(30):
        while await disk.rewrites() == before or (await disk.raw.info("persistence"))["aof_rewrite_in_progress"]:
            await asyncio.sleep(0.02)
    await disk.file.announce("a user")
    await disk.raw.delete("secret")
    with files_at_most(disk.server, 1 << 20):  # the process that rewrites would write more, and dies of it
        told = await disk.until_overdue("its rewrite failed", caplog)
        assert 1 <= told <= await disk.rewrites() - before - 1
    assert on_disk(SECRET, disk.server)
    await disk.until_forgotten()
    assert await disk.file.overdue_s() == 0


async def test_a_server_that_refuses_a_rewrite_is_told_and_asked_again(
    disk: Disk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, send = [], disk.connection.send

    async def refusing(server: StoreServer, command: str) -> object:
        if command == "BGREWRITEAOF":
            asked.append(command := "RENAMED")
        return await send(server, command)

    await disk.file.announce("a user")
    with monkeypatch.context() as patched:
        patched.setattr(disk.connection, "send", refusing)
        told = await disk.until_overdue("unknown command", caplog)
    assert told == len(asked) > 1
    await disk.until_forgotten()


async def test_many_erasures_are_not_as_many_rewrites(disk: Disk) -> None:
    before = await disk.rewrites()
    for _ in range(2):
        for _ in range(10):
            await disk.file.announce("a user")
        await disk.file.rewrite_if_due()
    await disk.until_forgotten()
    assert await disk.rewrites() <= before + 2  # the first one began too early for the last
    await disk.looked(0.9)
    assert await disk.rewrites() <= before + 2
