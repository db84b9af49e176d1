"""Who wants a signature, on Redis: the queue `mta:sign` of user keys."""

from __future__ import annotations

from server.store.redis_connection import RedisConnection
from server.store.redis_queue import RedisQueue


class RedisSigning:
    """`server.store.signing.SignQueue` on Redis.

    Args:
        connection: shared with the other stores.
    """

    def __init__(self, connection: RedisConnection) -> None:
        self._queue = RedisQueue(connection, "sign")

    async def ask(self, user_key: str) -> None:
        await self._queue.ask(user_key)

    async def take(self, worker: str, wait_s: float) -> str | None:
        return await self._queue.next(worker, wait_s)

    async def done(self, user_key: str) -> None:
        await self._queue.close(user_key)

    async def overdue(self) -> list[str]:
        now_ms = await self._queue.now_ms()
        due = await self._queue.due(now_ms)
        if await self._queue.waiting():
            for user_key in due:
                await self._queue.look_again(user_key, now_ms)  # their turn may well come: a worker is behind
            return []
        for user_key in due:
            await self._queue.announce(user_key)
        return due
