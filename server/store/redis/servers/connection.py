"""The connection to Redis 7.2+ or Valkey 8+ that the stores share, and what makes an acknowledged write durable.

Every change is one Lua script on one user's keys, so it is atomic on a cluster too. The script and, unless the server
fsyncs every write itself, `WAITAOF` travel in one round trip on one connection.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from adapters.errors import MtaError
from server.errors import Unavailable
from server.store.durability import Durability, Timed, untimed

CONNECTIONS = 64
CONNECT_TIMEOUT_S = 2.0
READ_TIMEOUT_S = 2.0
WAITAOF_TIMEOUT_MS = 10_000
WRITE_TIMEOUT_S = 15.0

_NOT_DURABLE = (
    "Redis does not guarantee to keep acknowledged writes: set `appendonly yes` and `appendfsync always` (or "
    "`everysec`; Redis 7.2+ or Valkey 8+), or MTA_REQUIRE_DURABLE_STORE=false to accept losses"
)


@contextmanager
def readable() -> Iterator[None]:
    """Translate decoding errors: the store is corrupt, or a later version wrote to it.

    Raises:
        Unavailable: with code `store_corrupt`.
    """
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise Unavailable("the store holds a record that this version cannot read", code="store_corrupt") from error


class RedisConnection:
    """Reads, and writes that are on disk when they return.

    Args:
        url: as in redis-py: `redis://`, `rediss://` or `unix://`.
        require_durable: whether a server whose writes are not durable is refused.
        timed: gets what every call took, but for those that wait for something to happen.

    Raises:
        MtaError: when the URL cannot be read.
    """

    def __init__(self, url: str, *, require_durable: bool = True, timed: Timed = untimed) -> None:
        try:
            # One retry: a connection that idled through a restart of the server fails once. Commits may be repeated.
            pool = redis.BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=READ_TIMEOUT_S,
                socket_connect_timeout=CONNECT_TIMEOUT_S,
                socket_timeout=WRITE_TIMEOUT_S,
                retry=Retry(NoBackoff(), 1),
            )
        except ValueError as error:
            raise MtaError(f"MTA_REDIS_URL is not a Redis URL: {error}") from error
        self._redis: Any = redis.Redis(connection_pool=pool)  # Any: its annotations mix sync and async answers
        self._require_durable = require_durable
        self._timed = timed
        self._durability = Durability.NONE

    @property
    def durability(self) -> Durability:
        """What `check` last found."""
        return self._durability

    async def check(self) -> Durability:
        """Reach the server and find out how its writes become durable.

        Raises:
            Unavailable: when it cannot be reached, or is not durable although that is required.
        """
        async with _translated(READ_TIMEOUT_S):
            self._durability = await self._find_durability()
        self._refuse_if_not_durable()
        return self._durability

    @asynccontextmanager
    async def pipeline(
        self, *, transaction: bool, timeout_s: float = READ_TIMEOUT_S, kind: str = "command"
    ) -> AsyncIterator[Any]:
        """Commands in one round trip; Redis's errors become `Unavailable`."""
        with _Measured(self._timed, kind):
            async with _translated(timeout_s), self._redis.pipeline(transaction=transaction) as pipe:
                yield pipe

    async def run(
        self, command: Callable[[Any], Awaitable[Any]], timeout_s: float = READ_TIMEOUT_S, *, waits: bool = False
    ) -> Any:
        """One command of redis-py's client, e.g. `lambda redis: redis.get(name)`; errors become `Unavailable`.

        Args:
            command: asks the client.
            timeout_s: the longest that it may take.
            waits: whether it waits for something to happen, so that its time says nothing of the server.
        """
        with _Measured(untimed if waits else self._timed, "command"):
            async with _translated(timeout_s):
                return await command(self._redis)

    async def write(self, script: str, names: Sequence[str], *arguments: Any) -> Any:
        """Run a script on some keys of one slot; return its answer once its writes are on disk."""
        self._refuse_if_not_durable()
        async with self.pipeline(transaction=False, timeout_s=WRITE_TIMEOUT_S, kind="write") as pipe:
            pipe.eval(script, len(names), *names, *arguments)
            if self._durability is Durability.WAITAOF:
                pipe.execute_command("WAITAOF", 1, 0, WAITAOF_TIMEOUT_MS)
            answer, *fsynced = await pipe.execute()
        if fsynced and fsynced[0][0] < 1:
            raise Unavailable(
                f"Redis did not confirm within {WAITAOF_TIMEOUT_MS // 1000} s that the write is on disk: send it again",
                code="store_not_durable",
            )
        return answer

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    def _refuse_if_not_durable(self) -> None:
        if self._durability is Durability.NONE and self._require_durable:
            raise Unavailable(_NOT_DURABLE, code="store_not_durable")

    async def _find_durability(self) -> Durability:
        try:
            config = await self._redis.config_get("appendonly", "appendfsync")
        except (NoPermissionError, ResponseError):  # managed services hide CONFIG
            return await self._try_waitaof()
        found = {_text(name): _text(value) for name, value in config.items()}
        if found.get("appendonly") != "yes" or found.get("appendfsync") == "no":
            return Durability.NONE  # with `no` the server never learns what is on disk: WAITAOF would wait for ever
        return Durability.ALWAYS if found.get("appendfsync") == "always" else await self._try_waitaof()

    async def _try_waitaof(self) -> Durability:
        """On a connection that wrote nothing WAITAOF answers at once: with an error if there is no file to wait for."""
        try:
            await self._redis.execute_command("WAITAOF", 1, 0, 1)
        except ResponseError:
            return Durability.NONE
        return Durability.WAITAOF


class _Measured:
    """Times a block; it failed if the store could not be used."""

    __slots__ = ("_kind", "_start_s", "_timed")

    def __init__(self, timed: Timed, kind: str) -> None:
        self._timed = timed
        self._kind = kind

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._timed(self._kind, time.perf_counter() - self._start_s, isinstance(error, Unavailable))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


@asynccontextmanager
async def _translated(timeout_s: float) -> AsyncIterator[None]:
    """The one place where Redis's errors become ours, and where we stop waiting for it."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        message = f"the store did not answer within {timeout_s:g} s: send the request again"
        raise Unavailable(message, code="store_unavailable") from error
    except (RedisError, OSError) as error:
        raise Unavailable("the store cannot be used now: send the request again", code="store_unavailable") from error
