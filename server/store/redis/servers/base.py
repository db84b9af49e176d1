"""The interface to the servers of Redis 7.2+ or Valkey 8+, and a single one of them.

Every change is one Lua script on keys of one slot, so it is atomic on a cluster too. `WAITAOF` is sent on the same
connection, because it only waits for writes of its own connection.

`RedisConnection` enforces timeouts by cancellation. redis-py gets no `socket_timeout`: it would then send through
`asyncio.wait_for`, which loses cancellations in Python 3.11.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ReadOnlyError, RedisError, ResponseError

from server.errors import Unavailable
from server.store.durability import Durability, Memory
from server.store.redis.scripts import Script

CONNECTIONS = 64
CONNECT_TIMEOUT_S = 2.0
READ_TIMEOUT_S = 2.0
WRITE_TIMEOUT_S = 15.0
CHECK_TIMEOUT_S = 3.0  # a check of a cluster may wait for a silent server twice, one second each
WAITAOF_TIMEOUT_MS = 10_000
REPLICA_TIMEOUT_MS = 4_000
WAITAOF = ("WAITAOF", 1, 0, WAITAOF_TIMEOUT_MS)
MEMORY_TIMEOUT_S = 0.5  # for `INFO memory` of one server: a replica may be silent, but a check must end in time

T = TypeVar("T")
Execute = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class StoreServer:
    """A server process; `execute("INFO")` sends it a command."""

    id: str  # stays the same when the address changes; empty if there is only one server
    execute: Execute


class Servers(Protocol):
    """One or more servers. Methods raise redis-py's errors, which `RedisConnection` translates."""

    unserved: str | None  # message about users who cannot be served while most can, set by `durability`

    async def run(self, command: Callable[[Any], Awaitable[Any]]) -> Any: ...

    async def write(
        self, script: Script, names: Sequence[str], arguments: Sequence[Any], durability: Durability
    ) -> Any:
        """Run a script on keys of one slot; return its answer once its writes are as durable as `durability` says."""

    async def durability(self) -> Durability:
        """Return the lowest durability among the servers that accept writes now."""

    async def members(self) -> list[StoreServer]:
        """Return all reachable servers that hold data."""

    async def holders(self, name: str = "") -> list[str]:
        """Return the ids of the servers whose files hold a key, or any key, reachable or not."""

    async def close(self) -> None: ...


class SingleServer:
    """A single server without replicas, at a URL as in redis-py. Raises `ValueError` if the URL is invalid.

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
            socket_timeout=None,
            retry=Retry(NoBackoff(), 1),
        )
        self._client: Any = redis.Redis(connection_pool=pool)  # Any: redis-py's annotations mix sync and async results

    async def run(self, command: Callable[[Any], Awaitable[Any]]) -> Any:
        return await self._reconnecting(lambda: command(self._client))

    async def execute(self, *command: object) -> Any:
        return await self.run(lambda client: client.execute_command(*command))

    async def write(
        self, script: Script, names: Sequence[str], arguments: Sequence[Any], durability: Durability
    ) -> Any:
        confirm = [WAITAOF] if durability is Durability.WAITAOF else []
        answer, confirmed = await self.send(script, names, arguments, confirm)
        check_confirmed(confirmed)
        return answer

    async def send(
        self, script: Script, names: Sequence[str], arguments: Sequence[Any], confirm: Sequence[tuple[object, ...]]
    ) -> tuple[Any, list[Any]]:
        """Run a script and further commands on one connection; return all answers."""

        async def work(*command: Any) -> tuple[Any, list[Any]]:
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.execute_command(*command)
                for confirmation in confirm:
                    pipe.execute_command(*confirmation)
                answer, *confirmed = await pipe.execute()
            return answer, confirmed

        return await script.run(lambda *command: self._reconnecting(lambda: work(*command)), names, arguments)

    async def durability(self) -> Durability:
        return await self._reconnecting(self._writable_durability)

    async def members(self) -> list[StoreServer]:
        return [StoreServer("", self.execute)]

    async def holders(self, name: str = "") -> list[str]:
        return [""]

    async def close(self) -> None:
        await self._client.aclose()
        await self._client.connection_pool.disconnect()

    async def _writable_durability(self) -> Durability:
        """Raise `ReadOnlyError` for a replica, even a writable one, since it loses writes."""
        replication = await self._client.info("replication")
        if replication["role"] != "master":
            primary = f"{replication.get('master_host')}:{replication.get('master_port')}"
            raise ReadOnlyError(f"it is a replica of {primary} and takes no writes")
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


async def durability_of(execute: Execute) -> Durability:
    with suppress(ResponseError):  # managed services hide CONFIG
        config = await execute("CONFIG GET", "appendonly", "appendfsync")
        if config.get("appendonly") != "yes" or config.get("appendfsync") == "no":
            return Durability.NONE  # with `no` the server does not track fsyncs, so WAITAOF would never return
        if config.get("appendfsync") == "always":
            return Durability.ALWAYS
    with suppress(ResponseError):  # there is no append-only file
        await execute("WAITAOF", 1, 0, 1)  # returns at once, since nothing was written on the connection
        return Durability.WAITAOF
    return Durability.NONE


async def memory_of(servers: Sequence[StoreServer]) -> tuple[list[str], Memory | None]:
    """Return the servers that may evict keys, each with its policy, and the memory use of the fullest server.

    Reads `INFO`, because managed services hide `CONFIG`. Skips servers that cannot be reached or refuse.
    """
    evicting, fullest = [], None
    for server, info in zip(servers, await asyncio.gather(*map(_memory_info, servers)), strict=True):
        if (policy := str(info.get("maxmemory_policy", "noeviction"))) != "noeviction":
            evicting.append(f"{server.id} {policy}".strip())
        if info:
            # Buffers for replicas and the append-only file do not count towards maxmemory.
            used = int(info.get("used_memory", 0)) - int(info.get("mem_not_counted_for_evict", 0))
            memory = Memory(used, int(info.get("maxmemory", 0)))
            fullest = memory if fullest is None or memory.share > fullest.share else fullest
    return evicting, fullest


async def _memory_info(server: StoreServer) -> dict[str, Any]:
    with suppress(RedisError, OSError, TimeoutError):
        async with asyncio.timeout(MEMORY_TIMEOUT_S):
            return dict(await server.execute("INFO", "memory"))
    return {}


def confirmations(durability: Durability, *, replicas: bool) -> list[tuple[object, ...]]:
    """Return the commands to send after a script to wait until its writes are durable.

    They are sent even if the server fsyncs before it answers, so that a replacement that does not is noticed.
    """
    if durability is Durability.NONE:
        return []
    return [WAITAOF, ("WAIT", 1, REPLICA_TIMEOUT_MS)] if replicas else [WAITAOF]


def check_confirmed(answers: Sequence[Any]) -> None:
    """Raise `Unavailable` unless the answers to `confirmations` confirm the write; the caller may send it again."""
    waits = (("on disk", WAITAOF_TIMEOUT_MS), ("on a replica", REPLICA_TIMEOUT_MS))
    for answer, (where, timeout_ms) in zip(answers, waits, strict=False):
        if (answer[0] if isinstance(answer, list) else answer) < 1:
            raise Unavailable(
                f"Redis did not confirm within {timeout_ms / 1000:g} s that the write is {where}: send it again",
                code="store_not_durable",
            )
