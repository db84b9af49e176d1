"""The connection that all stores share; it translates Redis errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from typing import Any
from urllib.parse import urlsplit

from redis.exceptions import OutOfMemoryError, RedisClusterException, RedisError, ResponseError

from adapters.errors import MtaError
from server.errors import Unavailable
from server.store.durability import Durability, Memory
from server.store.redis import keys
from server.store.redis.scripts import Script
from server.store.redis.servers.base import (
    CHECK_TIMEOUT_S,
    READ_TIMEOUT_S,
    WRITE_TIMEOUT_S,
    Servers,
    SingleServer,
    StoreServer,
    memory_of,
)
from server.store.redis.servers.cluster import Cluster
from server.store.redis.servers.sentinel import Sentinel

FULL_RETRY_S = 60  # an operator has to free memory first
REFUSED = "store_refused"  # error code: the server understands `send`'s command and does not run it
_NOT_DURABLE = (
    "Redis may lose acknowledged writes: set `appendonly yes` and `appendfsync always` (or "
    "`everysec`; Redis 7.2+ or Valkey 8+), or MTA_REQUIRE_DURABLE_STORE=false to accept data loss"
)
_FULL = (
    "the store is full and nothing was stored: send the request again once there is room; users can be erased and API "
    "keys revoked nevertheless"
)
_EVICTS = (
    "Redis drops acknowledged writes to free memory (maxmemory-policy: {}): set `maxmemory-policy noeviction`, or "
    "MTA_REQUIRE_DURABLE_STORE=false to accept data loss"
)
_INCOMPLETE = "the store is incomplete, since a restore has not ended: run `mta restore` again, or empty the store"
_KINDS: dict[str, Callable[[str], Servers]] = {"cluster": Cluster, "sentinel": Sentinel}

Timed = Callable[[str, float, bool], None]  # kind of a call (`write` or `command`), its seconds, whether it failed
Span = Callable[[str], AbstractContextManager[object]]  # opens a tracing span, by name


def untimed(kind: str, seconds: float, failed: bool) -> None:
    """Ignore the measurement."""


class RedisConnection:
    """Reads, and writes that are on disk when they return. Raises `MtaError` if the URL is invalid.

    `require_durable` refuses writes if any primary may lose acknowledged writes or any server may evict keys. `span`
    covers one write, including retries.
    """

    def __init__(
        self, url: str, *, require_durable: bool = True, timed: Timed = untimed, span: Span = nullcontext
    ) -> None:
        try:
            _, _, kind = urlsplit(url).scheme.partition("+")
            self._servers: Servers = _KINDS.get(kind, SingleServer)(url)
        except ValueError as error:
            raise MtaError(f"MTA_REDIS_URL is not a Redis URL: {error}") from error
        self._require_durable = require_durable
        self._timed = timed
        self._span = span
        self._evicting: list[str] = []
        self._incomplete = False
        self.restoring = False  # allows writes to a store whose restore has not ended
        self.durability = Durability.NONE
        self.memory: Memory | None = None

    @property
    def unserved(self) -> str | None:
        return self._servers.unserved

    @property
    def reads_are_durable(self) -> bool:
        """Whether everything that can be read is durable: true for a single server that fsyncs before it answers."""
        return self.durability is Durability.ALWAYS and isinstance(self._servers, SingleServer)

    async def check(self) -> Durability:
        async with _translated(CHECK_TIMEOUT_S):
            durability = await self._servers.durability()
            self._evicting, self.memory = await memory_of(await self._servers.members())
            self.durability = Durability.EVICTS if self._evicting and durability.is_durable else durability
            if not (self.restoring or self._servers.unserved):
                self._incomplete = bool(await self._servers.run(lambda redis: redis.exists(keys.RESTORING)))
        self._refuse_unsafe_writes()
        return self.durability

    async def evaluate(
        self, script: Script, names: Sequence[str], *arguments: Any, timeout_s: float = READ_TIMEOUT_S
    ) -> Any:
        """Run a script whose changes need not be durable."""
        return await self.run(lambda redis: script.run(redis.execute_command, names, arguments), timeout_s)

    async def run(self, command: Callable[[Any], Awaitable[Any]], timeout_s: float = READ_TIMEOUT_S) -> Any:
        """Run a command of redis-py's client, e.g. `lambda redis: redis.get(name)`; errors become `Unavailable`."""
        with _measured(self._timed, "command"):
            async with _translated(timeout_s):
                return await self._servers.run(command)

    async def write(self, script: Script, names: Sequence[str], *arguments: Any) -> Any:
        """Run a script on keys of one slot; return its answer once its writes are on disk.

        The script runs again if its answer is lost. The second run must return the same answer and repeat the write:
        Redis does not wait if the connection wrote nothing, although the data may not be on disk or on a replica yet.
        """
        self._refuse_unsafe_writes()
        with _measured(self._timed, "write"), self._span("store write"):
            async with _translated(WRITE_TIMEOUT_S):
                return await self._servers.write(script, names, arguments, self.durability)

    async def members(self) -> list[StoreServer]:
        async with _translated(READ_TIMEOUT_S):
            return await self._servers.members()

    async def holders(self, name: str = "") -> list[str]:
        async with _translated(READ_TIMEOUT_S):
            return await self._servers.holders(name)

    async def send(self, server: StoreServer, *command: str) -> Any:
        """Send a command to one server; errors become `Unavailable`, with the code `REFUSED` if it refuses."""
        async with _translated(READ_TIMEOUT_S):
            try:
                return await server.execute(*command)
            except ResponseError as error:
                raise Unavailable(str(error), code=REFUSED) from error

    async def names(self, server: StoreServer, pattern: str, count: int) -> AsyncIterator[list[str]]:
        """Yield the names of a server's keys, about `count` looked at in each step; a name may come twice."""
        cursor = None
        while cursor != b"0":
            cursor, names = await self.send(server, f"SCAN {int(cursor or 0)} MATCH {pattern} COUNT {count}")
            yield [name.decode() for name in names]

    async def close(self) -> None:
        await self._servers.close()

    def _refuse_unsafe_writes(self) -> None:
        if self._incomplete:
            raise Unavailable(_INCOMPLETE, code="store_incomplete")
        if self._require_durable and not self.durability.is_durable:
            evicts = self.durability is Durability.EVICTS
            message = _EVICTS.format(", ".join(self._evicting)) if evicts else _NOT_DURABLE
            raise Unavailable(message, code="store_not_durable")


@asynccontextmanager
async def _translated(timeout_s: float) -> AsyncIterator[None]:
    """Enforce a timeout and turn all Redis errors into `Unavailable`."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        message = f"the store did not answer within {timeout_s:g} s: send the request again"
        raise Unavailable(message, code="store_unavailable") from error
    except OutOfMemoryError as error:
        raise Unavailable(_FULL, code="store_full", retry_after_s=FULL_RETRY_S) from error
    except (RedisError, RedisClusterException, OSError) as error:
        raise Unavailable("the store cannot be used now: send the request again", code="store_unavailable") from error


@contextmanager
def _measured(timed: Timed, kind: str) -> Iterator[None]:
    start_s, failed = time.perf_counter(), False
    try:
        yield
    except Unavailable:
        failed = True
        raise
    finally:
        timed(kind, time.perf_counter() - start_s, failed)
