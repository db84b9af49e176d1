"""Queues on Redis (keys: `server/store/redis/keys.py`): they wake workers, and remember which users to check on.

A user who is called stays in `open` until their work is done. Calls that a worker had read when it died, that never
reached the stream, or that were lost are made again when the user's time in `open` comes, however busy workers are.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from redis.exceptions import ResponseError

from server.errors import Unavailable
from server.store.jobs import parse_job_id
from server.store.redis import keys
from server.store.redis import queue_scripts as scripts
from server.store.redis.servers.base import WRITE_TIMEOUT_S
from server.store.redis.servers.connection import RedisConnection

GROUP = "workers"
GRACE_MS = 10_000
"""How long a user waits for a worker before they are called again, unless their call is still unread."""

LISTED_MS = 60_000
"""How long a request has to create the work that it listed a user for."""

GONE_MS = 3_600_000
"""A worker that has read nothing for this long is not coming back under its name."""

_BATCH, _BATCHES = 100, 100
"""How many users one query returns, and how many queries one sweep makes."""


class RedisQueue:
    """User keys on their way to workers.

    Args:
        connection: shared with the store that holds the work.
        work: what workers are woken for.
        bank: the 8 hex digits of the bank that the work is for.
    """

    def __init__(self, connection: RedisConnection, work: keys.Work, bank: str) -> None:
        self._connection = connection
        self._bank = bank
        self._keys = keys.queue(work, bank)
        self._taken: dict[str, tuple[bytes, str]] = {}  # by user key: entry, and appointment then
        self._has_group = False
        self._is_listed = False

    async def enlist(self, user_key: str) -> int:
        """Begin to check on a user, before the work to be checked on is created.

        Returns:
            The time of the listing, in ms by the server's clock: pass it to `call` once the work is created, which must
            be within `LISTED_MS`.
        """
        await self._list()
        names = (self._keys.open, self._keys.listed)
        return int(await self._connection.write(scripts.ENLIST, names, user_key, LISTED_MS + GRACE_MS))

    async def call(self, user_key: str, listed_ms: int = 0) -> bool:
        """Wake a worker for a user, unless a call is still unread; returns whether one was made."""
        await self._list()
        names = (self._keys.calls, self._keys.called, self._keys.open, self._keys.listed)
        return bool(await self._connection.write(scripts.CALL, names, user_key, GRACE_MS, listed_ms, GROUP))

    async def next(self, worker: str, wait_s: float) -> str | None:
        """Wait for a user key, to be acknowledged with `acknowledge`."""
        await self._make_group()
        block_ms = max(1, round(wait_s * 1000))
        try:
            streams = await self._connection.run(
                lambda redis: redis.xreadgroup(GROUP, worker, {self._keys.calls: ">"}, count=1, block=block_ms),
                wait_s + WRITE_TIMEOUT_S,
                waits=True,
            )
        except Unavailable:
            self._has_group = False  # the server that comes back may be another one
            raise
        if not streams:
            return None
        entry, fields = streams[0][1][0]
        user_key: str = fields[b"id"].decode()
        self._taken[user_key] = entry, await self.appointment(user_key)
        return user_key

    async def acknowledge(self, user_key: str) -> str:
        """Acknowledge the call that `next` returned; returns the user's appointment at that time."""
        entry, appointment = self._taken.pop(user_key, (b"", ""))
        if entry:
            names = (self._keys.calls, self._keys.called, self._keys.begun)
            await self._connection.write(scripts.ACKNOWLEDGE, names, user_key, GROUP, entry)
        return appointment

    async def begin(self, user_key: str) -> int:
        """Count an attempt; returns how many there have been since `acknowledge`; 0 for who has left the queue."""
        names = (self._keys.open, self._keys.begun)
        return int(
            await self._connection.run(
                lambda redis: redis.eval(scripts.BEGIN, len(names), *names, user_key), WRITE_TIMEOUT_S
            )
        )

    async def due(self) -> AsyncIterator[tuple[str, str, int]]:
        """Users who are due for a check, each with their appointment and the server's time in ms; the caller is to
        `call`, `look_again` or `close` each of them.

        A time too far ahead to have been set by this clock counts as reached: the clock was set back.
        """
        for _ in range(_BATCHES):
            now_ms, found = await self._connection.write(scripts.DUE, (self._keys.open,), LISTED_MS + GRACE_MS, _BATCH)
            texts = [text.decode() for text in found]
            for user_key, appointment in zip(texts[::2], texts[1::2], strict=True):
                yield user_key, appointment, int(now_ms)
            if len(texts) < 2 * _BATCH:
                return

    async def appointment(self, user_key: str) -> str:
        """When a user is to be checked on, as the server writes it; empty if never. It changes with every call and
        listing, so that `close` can tell whether there was one since."""
        score = await self._connection.run(lambda redis: redis.execute_command("ZSCORE", self._keys.open, user_key))
        return _text(score)

    async def look_again(self, user_key: str, after_ms: int) -> None:
        """Check on a user again `GRACE_MS` after a time in ms."""
        await self._connection.run(
            lambda redis: redis.zadd(self._keys.open, {user_key: after_ms + GRACE_MS}), WRITE_TIMEOUT_S
        )

    async def close(self, user_key: str, appointment: str) -> None:
        """Stop checking on a user, and take back any call, unless they were called or listed since.

        Args:
            user_key: which user.
            appointment: the user's, read before the caller found that nothing is left to do.
        """
        names = (self._keys.calls, self._keys.called, self._keys.open, self._keys.listed, self._keys.begun)
        await self._connection.write(scripts.CLOSE, names, user_key, GROUP, appointment, LISTED_MS)

    async def open_count(self) -> int:
        """How many users are checked on."""
        return int(await self._connection.run(lambda redis: redis.zcard(self._keys.open)))

    async def waiting_count(self) -> int:
        """How many users are called."""
        return int(await self._connection.run(lambda redis: redis.hlen(self._keys.called)))

    async def oldest_s(self) -> float:
        """How long the oldest call has waited for somebody to begin with it; 0 without one."""
        waited_ms = await self._connection.run(lambda redis: redis.eval(scripts.OLDEST, 1, self._keys.calls))
        return int(waited_ms) / 1000

    async def tidy(self) -> None:
        """Forget workers that are gone, and take over what version 0.1 left in its queue."""
        await self._adopt()
        await self._make_group()
        for consumer in await self._connection.run(lambda redis: redis.xinfo_consumers(self._keys.calls, GROUP)):
            if consumer["idle"] > GONE_MS and not consumer["pending"]:
                name = consumer["name"]
                await self._delete(name)

    async def _list(self) -> None:
        """Put the bank on the list of those whose queues an erasure looks into, once for all users."""
        if not self._is_listed:
            await self._connection.run(lambda redis: redis.sadd(keys.BANKS, self._bank))
            self._is_listed = True

    async def _delete(self, consumer: bytes) -> None:
        await self._connection.run(lambda redis: redis.xgroup_delconsumer(self._keys.calls, GROUP, consumer))

    async def _adopt(self) -> None:
        """Version 0.1 kept one queue for all banks: a stream whose entries went when they were read, and a zset."""
        members = await self._connection.run(lambda redis: redis.zrange(self._keys.old_open, 0, -1))
        for member in members:
            job_id = parse_job_id(member.decode())  # for signatures, user keys
            await self.call(job_id.user_key if job_id else member.decode())
        if members:
            await self._connection.run(lambda redis: redis.zrem(self._keys.old_open, *members), WRITE_TIMEOUT_S)
            await self._connection.run(lambda redis: redis.delete(self._keys.old), WRITE_TIMEOUT_S)

    async def _make_group(self) -> None:
        if self._has_group:
            return
        try:
            await self._connection.run(
                lambda redis: redis.xgroup_create(self._keys.calls, GROUP, id="0", mkstream=True)
            )
        except Unavailable as error:
            if not (isinstance(error.__cause__, ResponseError) and "BUSYGROUP" in str(error.__cause__)):
                raise
        self._has_group = True


def _text(score: object) -> str:
    """A score as Lua sees it: RESP3 gives a number, RESP2 a string."""
    if score is None:
        return ""
    return score.decode() if isinstance(score, bytes) else f"{score:.17g}"
