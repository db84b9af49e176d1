"""User adapters on Redis: each under a key of its user, and lists of users by bank (`server/store/redis/keys.py`)."""

from __future__ import annotations

from collections.abc import AsyncIterator

from adapters.recipe import UserAdapterId
from server.store.adapters import StoredAdapter
from server.store.redis import keys
from server.store.redis.servers.base import WRITE_TIMEOUT_S
from server.store.redis.servers.connection import RedisConnection

_BATCH = 100

# KEYS: adapter. ARGV: how long it stays (s), then fields and values.
_LEND = """
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
return redis.call('EXPIRE', KEYS[1], ARGV[1])
"""

# KEYS: a list. ARGV: who is put on it, again if need be: a script that changes nothing is not waited for.
_LIST = """
redis.call('SREM', KEYS[1], ARGV[1])
return redis.call('SADD', KEYS[1], ARGV[1])
"""


class RedisAdapters:
    """`server.store.adapters.AdapterStore` on Redis.

    Args:
        connection: shared with the other stores.
    """

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def adapter(self, adapter_id: UserAdapterId) -> StoredAdapter | None:
        fields = ("id", "recipe", "sha256", "raw")
        name = keys.adapter(adapter_id.user_key)
        values = await self._connection.run(lambda redis: redis.hmget(name, fields), WRITE_TIMEOUT_S)
        if values[0] is None or values[0].decode() != adapter_id.id:
            return None
        return StoredAdapter(adapter_id.id, values[1].decode(), values[2].decode(), values[3])

    async def adapter_id(self, user_key: str) -> str | None:
        value = await self._connection.run(lambda redis: redis.hget(keys.adapter(user_key), "id"))
        return value.decode() if value is not None else None

    async def lend(self, user_key: str, stored: StoredAdapter, ttl_s: int) -> None:
        """Put an adapter where engines look for it, without a job and for a limited time: for an evaluation."""
        fields = ("id", stored.id, "recipe", stored.recipe, "sha256", stored.sha256, "raw", stored.raw)
        await self._connection.write(_LEND, (keys.adapter(user_key),), ttl_s, *fields)

    async def list_adapted(self, user_key: str, bank: str) -> None:
        """Put a user on a bank's list, for good: in a cluster nothing that is written for the user makes it last."""
        await self._connection.write(_LIST, (keys.BANKS,), bank)
        await self._connection.write(_LIST, (keys.adapted(bank),), user_key)

    async def banks(self) -> list[str]:
        banks = await self._connection.run(lambda redis: redis.smembers(keys.BANKS))
        return sorted(value.decode() for value in banks)

    async def adapted(self) -> dict[str, int]:
        counts = {bank: await self._count(bank) for bank in await self.banks()}
        return {bank: count for bank, count in counts.items() if count}

    async def adapted_users(self, bank: str) -> AsyncIterator[str]:
        cursor = 0
        while True:
            cursor, members = await self._scan(bank, cursor)
            for member in members:
                yield member.decode()
            if cursor == 0:
                return

    async def forget_adapted(self, user_key: str, *, but: str = "") -> None:
        banks = [bank for bank in await self.banks() if bank != but]
        async with self._connection.pipeline(WRITE_TIMEOUT_S) as pipe:
            for bank in banks:
                pipe.srem(keys.adapted(bank), user_key)
            await pipe.execute()

    async def _count(self, bank: str) -> int:
        return int(await self._connection.run(lambda redis: redis.scard(keys.adapted(bank))))

    async def _scan(self, bank: str, cursor: int) -> tuple[int, list[bytes]]:
        """Some users on a bank's list, and the cursor to go on from; 0 at the end."""
        after, members = await self._connection.run(lambda redis: redis.sscan(keys.adapted(bank), cursor, count=_BATCH))
        return int(after), members
