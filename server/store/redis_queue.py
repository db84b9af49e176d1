"""Queues on Redis: they wake workers, and remember when somebody should look after what was asked for.

Keys that all users share, for each queue::

    mta:<name>        stream   ids; read by a consumer group, an entry goes when it is read
    mta:<name>:open   zset     id → when somebody should look whether it is still going on, ms

An entry of the stream can be lost with the worker that read it: then its id's time in the zset comes.
"""

from __future__ import annotations

from redis.exceptions import ResponseError

from server.errors import Unavailable
from server.store.redis_connection import WRITE_TIMEOUT_S, RedisConnection

GROUP = "workers"
GRACE_MS = 10_000
"""After so long without a worker an id is announced again."""

_BATCH = 100


class RedisQueue:
    """Ids on their way to workers.

    Args:
        connection: shared with what the ids stand for.
        name: of the queue.
    """

    def __init__(self, connection: RedisConnection, name: str) -> None:
        self._connection = connection
        self._stream, self._open = f"mta:{name}", f"mta:{name}:open"
        self._has_group = False

    async def announce(self, name: str) -> None:
        """Wake a worker for an id."""
        await self.look_again(name, await self.now_ms())
        await self._add(name)

    async def ask(self, name: str) -> None:
        """Wake a worker for an id, unless it is asked for already."""
        at_ms = await self.now_ms() + GRACE_MS
        if await self._connection.run(lambda redis: redis.zadd(self._open, {name: at_ms}, nx=True), WRITE_TIMEOUT_S):
            await self._add(name)

    async def next(self, worker: str, wait_s: float) -> str | None:
        """Wait for an id; what comes twice or not at all is the reader's and `due`'s to mend."""
        await self._make_group()
        block_ms = max(1, round(wait_s * 1000))
        try:
            streams = await self._connection.run(
                lambda redis: redis.xreadgroup(GROUP, worker, {self._stream: ">"}, count=1, block=block_ms, noack=True),
                wait_s + WRITE_TIMEOUT_S,
            )
        except Unavailable:
            self._has_group = False  # whatever comes back may be another server
            raise
        if not streams:
            return None
        entry, fields = streams[0][1][0]
        await self._connection.run(lambda redis: redis.xdel(self._stream, entry))
        name: bytes = fields[b"id"]
        return name.decode()

    async def waiting(self) -> int:
        """How many entries no worker has read yet."""
        return int(await self._connection.run(lambda redis: redis.xlen(self._stream)))

    async def due(self, now_ms: int) -> list[str]:
        """The first ids that should be looked after by now."""
        members = await self._connection.run(
            lambda redis: redis.zrangebyscore(self._open, "-inf", now_ms, start=0, num=_BATCH)
        )
        return [member.decode() for member in members]

    async def look_again(self, name: str, after_ms: int) -> None:
        """Look after an id once the grace is over, counted from a Unix time in milliseconds."""
        at_ms = after_ms + GRACE_MS
        await self._connection.run(lambda redis: redis.zadd(self._open, {name: at_ms}), WRITE_TIMEOUT_S)

    async def close(self, name: str) -> None:
        """Look after an id no more."""
        await self._connection.run(lambda redis: redis.zrem(self._open, name), WRITE_TIMEOUT_S)

    async def open_count(self) -> int:
        """How many ids are looked after."""
        return int(await self._connection.run(lambda redis: redis.zcard(self._open)))

    async def now_ms(self) -> int:
        """The server's clock: leases of all workers are measured by it."""
        seconds, micros = await self._connection.run(lambda redis: redis.time())
        return int(seconds) * 1000 + int(micros) // 1000

    async def _add(self, name: str) -> None:
        await self._connection.run(lambda redis: redis.xadd(self._stream, {"id": name}), WRITE_TIMEOUT_S)

    async def _make_group(self) -> None:
        if self._has_group:
            return
        try:
            await self._connection.run(lambda redis: redis.xgroup_create(self._stream, GROUP, id="0", mkstream=True))
        except Unavailable as error:
            if not (isinstance(error.__cause__, ResponseError) and "BUSYGROUP" in str(error.__cause__)):
                raise
        self._has_group = True
