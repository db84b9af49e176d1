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
    """`server.store.adapters.AdapterStore` on Redis."""

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
        banks = await self.banks()
        async with self._connection.pipeline() as pipe:
            for bank in banks:
                pipe.scard(keys.adapted(bank))
            counts = await pipe.execute()
        return {bank: count for bank, count in zip(banks, counts, strict=True) if count}

    async def adapted_users(self, bank: str) -> AsyncIterator[str]:
        name, after = keys.adapted(bank), 0
        while True:
            async with self._connection.pipeline() as pipe:
                pipe.sscan(name, after, count=_BATCH)
                [(after, members)] = await pipe.execute()
            for member in members:
                yield member.decode()
            if after == 0:
                return

    async def forget_adapted(self, user_key: str, *, but: str = "") -> None:
        banks = [bank for bank in await self.banks() if bank != but]
        async with self._connection.pipeline(WRITE_TIMEOUT_S) as pipe:
            for bank in banks:
                pipe.srem(keys.adapted(bank), user_key)
            await pipe.execute()
