"""What was erased leaves the store's file on disk by the time that was promised, whoever dies meanwhile."""

from __future__ import annotations

import asyncio
import random
import resource
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import redis.asyncio as redis
from redis.exceptions import ResponseError

from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable
from server.store.redis.servers.append_only_file import AppendOnlyFile
from server.store.redis.servers.base import StoreServer
from server.store.redis.servers.connection import RedisConnection
from tests.support.stored import connected, on_disk

SECRET = "words that nobody shall find again"


@pytest.fixture
async def raw(one_server: ValkeyProcess, quick_rewrites: None) -> AsyncIterator[redis.Redis]:
    async with redis.from_url(one_server.url) as raw:
        await raw.flushall()
        await raw.set("secret", SECRET)
        yield raw


@pytest.fixture
async def file(one_server: ValkeyProcess) -> AsyncIterator[AppendOnlyFile]:
    async with connected(one_server.url) as connection:
        yield AppendOnlyFile(connection)


async def looked(file: AppendOnlyFile, seconds: float) -> None:
    """Look now and then, as a gateway does."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        await file.rewrite_if_due()
        await asyncio.sleep(0.05)


async def rewritten(raw: redis.Redis) -> None:
    await raw.bgrewriteaof()
    async with asyncio.timeout(30):
        while (info := await raw.info("persistence"))["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"]:
            await asyncio.sleep(0.02)


@contextmanager
def files_at_most(server: ValkeyProcess, size: int) -> Iterator[None]:
    """Let the server and its children write no file beyond a size, until the block ends; who tries dies."""
    before = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, before)


async def settled(raw: redis.Redis) -> bool:
    return not await raw.hexists("mta:{rewrite}", "due")


async def until_settled(raw: redis.Redis, file: AppendOnlyFile) -> None:
    async with asyncio.timeout(30):
        while not await settled(raw):
            await looked(file, 0.1)


async def until_failed(raw: redis.Redis, file: AppendOnlyFile, caplog: pytest.LogCaptureFixture) -> list[int]:
    """Look until four failures were told, each once; returns by how much later each was to be followed, in ms."""
    retries_ms: list[int] = []
    async with asyncio.timeout(60):
        while len(retries_ms) < 4:
            await file.rewrite_if_due()
            if f"failed {len(retries_ms) + 1} times in a row" in caplog.text:
                retries_ms.append(int(await raw.hget("mta:{rewrite}", "retry")))
            await asyncio.sleep(0.02)
    assert len([line for line in caplog.messages if "times in a row" in line]) == 4
    return [later - earlier for earlier, later in pairwise(retries_ms)]


async def test_what_was_erased_is_gone_by_the_time_that_was_promised(
    raw: redis.Redis, file: AppendOnlyFile, one_server: ValkeyProcess
) -> None:
    asked = await file.request_rewrite("a user")
    await raw.delete("secret")
    assert on_disk(SECRET, one_server)
    await until_settled(raw, file)
    assert not on_disk(SECRET, one_server)
    began_ms = int(await raw.hget("mta:{rewrite}", "last"))
    assert asked.erase_by_ms <= began_ms <= asked.rewritten_by_ms


async def test_a_rewrite_that_began_before_the_erasure_settles_nothing(
    raw: redis.Redis, file: AppendOnlyFile, one_server: ValkeyProcess
) -> None:
    await file.request_rewrite("a user")
    await asyncio.sleep(0.25)
    await file.rewrite_if_due()  # begins
    asked = await file.request_rewrite("a user")
    await looked(file, 0.3)
    assert not await settled(raw)
    await raw.delete("secret")
    await until_settled(raw, file)
    assert not on_disk(SECRET, one_server)
    assert int(await raw.hget("mta:{rewrite}", "last")) <= asked.rewritten_by_ms


async def test_a_rewrite_whose_gateway_died_is_begun_by_another(
    raw: redis.Redis, file: AppendOnlyFile, one_server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    await file.request_rewrite("a user")
    await raw.delete("secret")
    await asyncio.sleep(0.25)

    async def died(server: StoreServer, *, enabled: bool) -> None: ...

    with monkeypatch.context() as patched:
        patched.setattr(file, "_begin", died)
        await file.rewrite_if_due()
    assert await raw.hexists("mta:{rewrite}", "began")
    await until_settled(raw, file)
    assert not on_disk(SECRET, one_server)


async def test_a_rewrite_that_the_server_did_not_end_is_begun_again(
    raw: redis.Redis, file: AppendOnlyFile, one_server: ValkeyProcess
) -> None:
    await file.request_rewrite("a user")
    await raw.delete("secret")
    await asyncio.sleep(0.25)
    await file.rewrite_if_due()
    one_server.kill()
    one_server.start()
    await raw.connection_pool.disconnect()
    await until_settled(raw, file)
    assert not on_disk(SECRET, one_server)


async def test_a_failing_rewrite_is_tried_ever_more_rarely_and_logged(
    raw: redis.Redis, file: AppendOnlyFile, one_server: ValkeyProcess, caplog: pytest.LogCaptureFixture
) -> None:
    await raw.set("much", random.randbytes(2 << 20))
    await rewritten(raw)  # what the server appends to is short from here on
    await file.request_rewrite("a user")
    await raw.delete("secret")
    with files_at_most(one_server, 1 << 20):  # the process that rewrites would write more, and dies of it
        before = (await raw.info("persistence"))["aof_rewrites"]
        later_ms = await until_failed(raw, file, caplog)
        assert (await raw.info("persistence"))["aof_rewrites"] - before == 4
        assert await file.overdue_s() > 0
    assert [more_ms >= least_ms for more_ms, least_ms in zip(later_ms, (300, 600, 800), strict=True)] == [True] * 3
    assert on_disk(SECRET, one_server)
    await until_settled(raw, file)
    assert not on_disk(SECRET, one_server)
    assert await file.overdue_s() == 0
    assert sorted(await raw.hkeys("mta:{rewrite}")) == [b"asked", b"last"]


async def test_a_server_that_refuses_to_rewrite_is_asked_ever_more_rarely(
    raw: redis.Redis, file: AppendOnlyFile, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    async def refusing(self: RedisConnection, server: StoreServer, command: str) -> object:
        if command != "BGREWRITEAOF":
            return await send(self, server, command)
        asked.append(command)
        raise Unavailable("not now") from ResponseError("unknown command")

    send = RedisConnection.send
    await file.request_rewrite("a user")
    with monkeypatch.context() as patched:
        patched.setattr(RedisConnection, "send", refusing)
        later_ms = await until_failed(raw, file, caplog)
        assert len(asked) == 4
    assert [more_ms >= least_ms for more_ms, least_ms in zip(later_ms, (300, 600, 800), strict=True)] == [True] * 3
    assert "unknown command" in caplog.messages[-1]
    assert await file.overdue_s() > 0
    await until_settled(raw, file)


async def test_many_erasures_are_not_as_many_rewrites(raw: redis.Redis, file: AppendOnlyFile) -> None:
    before = (await raw.info("persistence"))["aof_rewrites"]
    for _ in range(20):
        await file.request_rewrite("a user")
    await until_settled(raw, file)
    await looked(file, 0.5)
    assert (await raw.info("persistence"))[
        "aof_rewrites"
    ] <= before + 2  # the first ones fell due too early for the last
