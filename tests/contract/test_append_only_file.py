"""What was erased leaves the store's file on disk by the time that was promised, whoever dies meanwhile."""

from __future__ import annotations

import asyncio
import random
import resource
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import pytest
from redis.asyncio import Redis

from bench.rig.valkey import ValkeyProcess
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
            await asyncio.sleep(0.05)

    async def until_forgotten(self) -> None:
        await self.raw.delete("secret")
        async with asyncio.timeout(30):
            while await self.raw.hexists(STATE, "due"):
                await self.looked(0.1)
        assert not on_disk(SECRET, self.server)

    async def until_failed(self, caplog: pytest.LogCaptureFixture) -> None:
        """Look until four failures were told, each once and each later than the last, and the file is overdue."""
        retries_ms: list[int] = []
        async with asyncio.timeout(60):
            while len(retries_ms) < 4:
                await self.file.rewrite_if_due()
                if f"failed {len(retries_ms) + 1} times in a row" in caplog.text:
                    retries_ms.append(int(await self.raw.hget(STATE, "retry")))
                await asyncio.sleep(0.02)
        assert len([line for line in caplog.messages if "times in a row" in line]) == 4
        later_ms = [later - earlier for earlier, later in pairwise(retries_ms)]
        assert [more_ms >= least_ms for more_ms, least_ms in zip(later_ms, (300, 600, 800), strict=True)] == [True] * 3
        assert await self.file.overdue_s() > 0

    async def rewrites(self) -> int:
        return int((await self.raw.info("persistence"))["aof_rewrites"])


@pytest.fixture
async def disk(one_server: ValkeyProcess, quick_rewrites: None) -> AsyncIterator[Disk]:
    async with Redis.from_url(one_server.url) as raw, connected(one_server.url) as connection:
        await raw.flushall()
        await raw.set("secret", SECRET)
        yield Disk(one_server, raw, connection, AppendOnlyFile(connection))


async def test_what_expires_later_is_left_out_by_a_rewrite_after_that(disk: Disk) -> None:
    before = await disk.rewrites()
    asked_ms = (await disk.file.request_rewrite("a user")).erase_by_ms - append_only_file.ERASE_MS
    await disk.file.request_all(600)
    await disk.file.request_rewrite("another user")
    await disk.until_forgotten()
    assert int(await disk.raw.hget(STATE, "last")) >= asked_ms + 600
    assert await disk.rewrites() > before


async def test_what_was_erased_is_gone_by_the_time_that_was_promised(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(append_only_file, "REWRITE_MS", 30_000)
    asked = await disk.file.request_rewrite("a user")
    assert on_disk(SECRET, disk.server)
    await disk.until_forgotten()
    began_ms = int(await disk.raw.hget(STATE, "last"))
    assert asked.erase_by_ms <= began_ms <= asked.rewritten_by_ms


async def test_a_rewrite_that_began_before_the_erasure_settles_nothing(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(append_only_file, "INTERVAL_MS", 60_000)
    await disk.file.request_rewrite("a user")
    await asyncio.sleep(0.25)
    await disk.file.rewrite_if_due()  # begins
    asked = await disk.file.request_rewrite("a user")
    while await disk.raw.hexists(STATE, "began"):
        await disk.looked(0.05)
    assert await disk.raw.hexists(STATE, "due")
    monkeypatch.setattr(append_only_file, "INTERVAL_MS", 0)
    await disk.until_forgotten()
    assert int(await disk.raw.hget(STATE, "last")) <= asked.rewritten_by_ms


@pytest.mark.parametrize("dies", ["gateway", "server"])
async def test_a_rewrite_is_begun_again_when_somebody_died_over_it(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    async def died(server: StoreServer, *, enabled: bool) -> None: ...

    await disk.file.request_rewrite("a user")
    await disk.raw.delete("secret")
    await asyncio.sleep(0.25)
    with monkeypatch.context() as patched:
        if dies == "gateway":
            patched.setattr(disk.file, "_start", died)
        await disk.file.rewrite_if_due()
    assert await disk.raw.hexists(STATE, "began")
    if dies == "server":
        disk.server.kill()
        disk.server.start()
        await disk.raw.connection_pool.disconnect()
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


async def test_a_failing_rewrite_is_tried_ever_more_rarely(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    await disk.raw.set("much", random.randbytes(2 << 20))
    before = await disk.rewrites()
    await disk.raw.bgrewriteaof()  # what the server appends to is short from here on
    async with asyncio.timeout(30):
        while await disk.rewrites() == before or (await disk.raw.info("persistence"))["aof_rewrite_in_progress"]:
            await asyncio.sleep(0.02)
    await disk.file.request_rewrite("a user")
    await disk.raw.delete("secret")
    with files_at_most(disk.server, 1 << 20):  # the process that rewrites would write more, and dies of it
        await disk.until_failed(caplog)
        assert await disk.rewrites() == before + 5
    assert on_disk(SECRET, disk.server)
    await disk.until_forgotten()
    assert await disk.file.overdue_s() == 0
    assert sorted(await disk.raw.hkeys(STATE)) == [b"asked", b"last"]


async def test_a_server_that_refuses_to_rewrite_is_asked_ever_more_rarely(
    disk: Disk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, send = [], disk.connection.send

    async def refusing(server: StoreServer, command: str) -> object:
        if command == "BGREWRITEAOF":
            asked.append(command := "RENAMED")
        return await send(server, command)

    await disk.file.request_rewrite("a user")
    with monkeypatch.context() as patched:
        patched.setattr(disk.connection, "send", refusing)
        await disk.until_failed(caplog)
    assert len(asked) == 4
    assert all("unknown command" in line for line in caplog.messages if "times in a row" in line)
    await disk.until_forgotten()


async def test_many_erasures_are_not_as_many_rewrites(disk: Disk) -> None:
    before = await disk.rewrites()
    for _ in range(20):
        await disk.file.request_rewrite("a user")
    await disk.until_forgotten()
    await disk.looked(0.5)
    assert await disk.rewrites() <= before + 2  # the first ones fell due too early for the last
