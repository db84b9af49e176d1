"""One server on its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ReadOnlyError

from server.store.durability import Durability
from server.store.redis.servers.base import (
    CONNECT_TIMEOUT_S,
    CONNECTIONS,
    READ_TIMEOUT_S,
    WAITAOF,
    WAITAOF_TIMEOUT_MS,
    Server,
    durability_of,
    unconfirmed,
)

T = TypeVar("T")


class Alone:
    """`Servers` that are one.

    Behind its address may be another one tomorrow. Whoever meets a server that takes no writes drops all connections:
    they are made anew, to whoever has the address then.

    Args:
        url: as in redis-py: `redis://`, `rediss://` or `unix://`.

    Raises:
        ValueError: when the URL cannot be read.
    """

    def __init__(self, url: str) -> None:
        # One retry: a connection that idled through a restart of the server fails once. Commits may be repeated.
        pool = redis.BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=READ_TIMEOUT_S,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            socket_timeout=None,  # see `base.py`
            retry=Retry(NoBackoff(), 1),
        )
        self._client: Any = redis.Redis(connection_pool=pool)  # Any: its annotations mix sync and async answers

    @property
    def unserved(self) -> None:
        """It serves all or none."""

    async def run(self, command: Callable[[Any], Awaitable[Any]]) -> Any:
        return await self._anew(lambda: command(self._client))

    @asynccontextmanager
    async def pipeline(self) -> AsyncIterator[Any]:
        try:
            async with self._client.pipeline(transaction=False) as pipe:
                yield pipe
        except ReadOnlyError:
            await self._drop()
            raise

    async def evaluate(
        self, script: str, names: Sequence[str], arguments: Sequence[Any], durability: Durability
    ) -> Any:
        return await self._anew(lambda: self._evaluate(script, names, arguments, durability))

    async def durability(self) -> Durability:
        return await self._anew(self._look)

    async def members(self) -> list[Server]:
        return [Server("", self._client.execute_command)]

    async def holders(self, name: str) -> list[str]:
        return [""]

    async def close(self) -> None:
        await self._client.aclose()
        await self._client.connection_pool.disconnect()

    async def _evaluate(
        self, script: str, names: Sequence[str], arguments: Sequence[Any], durability: Durability
    ) -> Any:
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.eval(script, len(names), *names, *arguments)
            if durability is Durability.WAITAOF:
                pipe.execute_command(*WAITAOF)
            answer, *fsynced = await pipe.execute()
        if fsynced and fsynced[0][0] < 1:
            raise unconfirmed("on disk", WAITAOF_TIMEOUT_MS)
        return answer

    async def _look(self) -> Durability:
        """Raises `ReadOnlyError` of a replica, even one that would take writes: it loses them."""
        replication = await self._client.info("replication")
        if replication["role"] != "master":
            place = f"{replication.get('master_host')}:{replication.get('master_port')}"
            raise ReadOnlyError(f"it is a replica of {place} and takes no writes")
        return await durability_of(self._client.execute_command)

    async def _anew(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do it once more, over a new connection, where the server takes no writes: then nothing was written."""
        try:
            return await work()
        except ReadOnlyError:
            await self._drop()
        try:
            return await work()
        except ReadOnlyError:
            await self._drop()
            raise

    async def _drop(self) -> None:
        """Connect anew: at once, or as soon as who uses a connection has done with it."""
        pool = self._client.connection_pool
        await pool.update_active_connections_for_reconnect()
        await pool.disconnect(inuse_connections=False)
