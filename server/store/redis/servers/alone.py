"""One server on its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

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


class Alone:
    """`Servers` that are one.

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

    async def run(self, command: Callable[[Any], Awaitable[Any]]) -> Any:
        return await command(self._client)

    @asynccontextmanager
    async def pipeline(self) -> AsyncIterator[Any]:
        async with self._client.pipeline(transaction=False) as pipe:
            yield pipe

    async def evaluate(
        self, script: str, names: Sequence[str], arguments: Sequence[Any], durability: Durability
    ) -> Any:
        async with self.pipeline() as pipe:
            pipe.eval(script, len(names), *names, *arguments)
            if durability is Durability.WAITAOF:
                pipe.execute_command(*WAITAOF)
            answer, *fsynced = await pipe.execute()
        if fsynced and fsynced[0][0] < 1:
            raise unconfirmed("on disk", WAITAOF_TIMEOUT_MS)
        return answer

    async def durability(self) -> Durability:
        return await durability_of(self._client.execute_command)

    async def members(self) -> list[Server]:
        return [Server("", self._client.execute_command)]

    async def holders(self, name: str) -> list[str]:
        return [""]

    async def close(self) -> None:
        await self._client.aclose()
        await self._client.connection_pool.disconnect()
