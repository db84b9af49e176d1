"""Which users need a signature, on Redis: one queue of user keys per bank."""

from __future__ import annotations

from server.store.redis.queue import RedisQueue
from server.store.redis.servers.connection import RedisConnection


class RedisSigning:
    """`server.store.signing.SignQueue` on Redis.

    Args:
        connection: shared with the other stores.
        bank: the 8 hex digits of the bank that signatures are for.
    """

    def __init__(self, connection: RedisConnection, bank: str) -> None:
        self._queue = RedisQueue(connection, "sign", bank)

    async def ask(self, user_key: str) -> None:
        await self._queue.call(user_key)

    async def take(self, worker: str, wait_s: float) -> str | None:
        return await self._queue.next(worker, wait_s)

    async def begin(self, user_key: str) -> int:
        return await self._queue.begin(user_key)

    async def done(self, user_key: str) -> None:
        await self._queue.close(user_key, await self._queue.acknowledge(user_key))

    async def overdue(self) -> list[str]:
        await self._queue.tidy()
        return [user_key async for user_key, *_ in self._queue.due() if await self._queue.call(user_key)]

    async def withdraw(self, user_key: str) -> None:
        await self._queue.close(user_key, await self._queue.appointment(user_key))
