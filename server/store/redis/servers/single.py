"""A single server without replicas."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
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
    StoreServer,
    check_confirmed,
    durability_of,
)

T = TypeVar("T")


class SingleServer:
    """A single server, at a URL as in redis-py. Raises `ValueError` if the URL is invalid.

    The address may move to another server. A call that reaches a replica therefore drops all connections.
    """

    unserved: str | None = None  # a single server serves all users or none

    def __init__(self, url: str) -> None:
        # One retry: an idle connection fails once after the server has restarted. Commits are safe to repeat.
        pool = redis.BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=READ_TIMEOUT_S,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            socket_timeout=None,  # see `base.py`
            retry=Retry(NoBackoff(), 1),
        )
        self._client: Any = redis.Redis(connection_pool=pool)  # Any: redis-py's annotations mix sync and async results

    async def run(self, command: Callable[[Any], Awaitable[Any]]) -> Any:
        return await self._reconnecting(lambda: command(self._client))

    async def write(self, script: str, names: Sequence[str], arguments: Sequence[Any], durability: Durability) -> Any:
        confirm = [WAITAOF] if durability is Durability.WAITAOF else []
        answer, confirmed = await self.send(script, names, arguments, confirm)
        check_confirmed(confirmed)
        return answer

    async def send(
        self, script: str, names: Sequence[str], arguments: Sequence[Any], confirm: Sequence[tuple[object, ...]]
    ) -> tuple[Any, list[Any]]:
        """Run a script and further commands on one connection; return all answers."""

        async def work() -> tuple[Any, list[Any]]:
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.eval(script, len(names), *names, *arguments)
                for command in confirm:
                    pipe.execute_command(*command)
                answer, *confirmed = await pipe.execute()
            return answer, confirmed

        return await self._reconnecting(work)

    async def durability(self) -> Durability:
        return await self._reconnecting(self._writable_durability)

    async def members(self) -> list[StoreServer]:
        return [StoreServer("", self._client.execute_command)]

    async def holders(self, name: str) -> list[str]:
        return [""]

    async def close(self) -> None:
        await self._client.aclose()
        await self._client.connection_pool.disconnect()

    async def _writable_durability(self) -> Durability:
        """Raise `ReadOnlyError` for a replica, even a writable one, since it loses writes."""
        replication = await self._client.info("replication")
        if replication["role"] != "master":
            place = f"{replication.get('master_host')}:{replication.get('master_port')}"
            raise ReadOnlyError(f"it is a replica of {place} and takes no writes")
        return await durability_of(self._client.execute_command)

    async def _reconnecting(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run `work`, and once more on a new connection if the server refuses writes: then nothing was written."""
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
        """Drop all connections: idle ones at once, busy ones when they become free."""
        pool = self._client.connection_pool
        await pool.update_active_connections_for_reconnect()
        await pool.disconnect(inuse_connections=False)
