"""What was erased leaves the store's file on disk by the time that was promised, whoever dies meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import redis.asyncio as redis

from bench.rig.valkey import ValkeyProcess
from server.store.redis.servers.append_only_file import AppendOnlyFile
from server.store.redis.servers.base import Server
from server.store.redis.servers.connection import RedisConnection

SECRET = b"words that nobody shall find again"


@pytest.fixture
async def raw(one_server: ValkeyProcess, quick_rewrites: None) -> AsyncIterator[redis.Redis]:
    """A server that holds a secret."""
    async with redis.from_url(one_server.url) as raw:
        await raw.flushall()
        await raw.set("secret", SECRET)
        yield raw


@pytest.fixture
async def file(one_server: ValkeyProcess) -> AsyncIterator[AppendOnlyFile]:
    connection = RedisConnection(one_server.url)
    await connection.check()
    yield AppendOnlyFile(connection)
    await connection.close()


def on_disk(server: ValkeyProcess) -> bool:
    """Whether the secret stands in any file of the server's."""
    return any(SECRET in path.read_bytes() for path in server.folder.rglob("*") if path.is_file())


async def looked(file: AppendOnlyFile, seconds: float) -> None:
    """Look now and then, as a gateway does."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        await file.look()
        await asyncio.sleep(0.05)


async def settled(raw: redis.Redis) -> bool:
    return not await raw.hexists("mta:{rewrite}", "due")


async def until_settled(raw: redis.Redis, file: AppendOnlyFile) -> None:
    async with asyncio.timeout(30):
        while not await settled(raw):
            await looked(file, 0.1)


async def test_what_was_erased_is_gone_by_the_time_that_was_promised(
    raw: redis.Redis, file: AppendOnlyFile, one_server: ValkeyProcess
) -> None:
    asked = await file.ask_for_rewrite("a user")
    await raw.delete("secret")
    assert on_disk(one_server)
    await until_settled(raw, file)
    assert not on_disk(one_server)
    began_ms = int(await raw.hget("mta:{rewrite}", "last"))
    assert asked.erase_by_ms <= began_ms <= asked.rewritten_by_ms


async def test_a_rewrite_that_began_before_the_erasure_settles_nothing(
    raw: redis.Redis, file: AppendOnlyFile, one_server: ValkeyProcess
) -> None:
    await file.ask_for_rewrite("a user")
    await asyncio.sleep(0.35)
    await file.look()  # begins
    asked = await file.ask_for_rewrite("a user")
    await looked(file, 0.3)
    assert not await settled(raw)
    await raw.delete("secret")
    await until_settled(raw, file)
    assert not on_disk(one_server)
    assert int(await raw.hget("mta:{rewrite}", "last")) <= asked.rewritten_by_ms


async def test_a_rewrite_that_its_gateway_did_not_live_to_begin_is_begun_by_another(
    raw: redis.Redis, file: AppendOnlyFile, one_server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    await file.ask_for_rewrite("a user")
    await raw.delete("secret")
    await asyncio.sleep(0.35)

    async def died(server: Server, *, enabled: bool) -> None: ...

    with monkeypatch.context() as patched:
        patched.setattr(file, "_begin", died)
        await file.look()
    assert await raw.hexists("mta:{rewrite}", "began")
    await until_settled(raw, file)
    assert not on_disk(one_server)


async def test_a_rewrite_that_the_server_did_not_live_to_end_is_begun_again(
    raw: redis.Redis, file: AppendOnlyFile, one_server: ValkeyProcess
) -> None:
    await file.ask_for_rewrite("a user")
    await raw.delete("secret")
    await asyncio.sleep(0.35)
    await file.look()
    one_server.kill()
    one_server.start()
    await raw.connection_pool.disconnect()
    await until_settled(raw, file)
    assert not on_disk(one_server)


async def test_many_erasures_are_not_as_many_rewrites(raw: redis.Redis, file: AppendOnlyFile) -> None:
    before = (await raw.info("persistence"))["aof_rewrites"]
    for _ in range(20):
        await file.ask_for_rewrite("a user")
    await until_settled(raw, file)
    await looked(file, 0.5)
    assert (await raw.info("persistence"))[
        "aof_rewrites"
    ] <= before + 2  # the first ones fell due too early for the last


async def test_an_erasure_remembered_by_version_0_1_is_not_forgotten(
    raw: redis.Redis, file: AppendOnlyFile, one_server: ValkeyProcess
) -> None:
    await raw.delete("secret")
    await raw.set("mta:{rewrite}:due", 1)
    await file.look()
    await until_settled(raw, file)
    assert not on_disk(one_server)
    assert not await raw.exists("mta:{rewrite}:due")
