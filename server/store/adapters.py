"""User adapters, each under a key of its user, and lists of users by bank (keys: `server/store/redis/keys.py`)."""

from __future__ import annotations

import secrets
from base64 import b32encode
from collections.abc import AsyncIterator
from dataclasses import dataclass
from operator import methodcaller

from adapters.recipe import UserAdapterId
from server.store.redis import keys
from server.store.redis.servers.base import WRITE_TIMEOUT_S
from server.store.redis.servers.connection import RedisConnection

_BATCH = 100

# KEYS: adapter. ARGV: how long it stays (s), then fields and values.
_PUT_TEMPORARY = """
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
return redis.call('EXPIRE', KEYS[1], ARGV[1])
"""

# KEYS: a list. ARGV: who is put on it, again if need be: a script that changes nothing is not waited for.
_ADD_MEMBER = """
redis.call('SREM', KEYS[1], ARGV[1])
return redis.call('SADD', KEYS[1], ARGV[1])
"""


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A user adapter: the recipe it was trained on, and the bytes that `adapters.user_adapter` encoded."""

    id: str
    recipe: str
    sha256: str  # of the bytes, 64 hex digits
    raw: bytes


def new_adapter_id() -> str:
    """26 characters of base32: 128 random bits, in the alphabet and length that recipe names take."""
    return b32encode(secrets.token_bytes(16)).decode().rstrip("=").lower()


class AdapterStore:
    """Keeps user adapters. Every method raises `Unavailable` when the store cannot be used."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def adapter(self, adapter_id: UserAdapterId) -> StoredAdapter | None:
        """An adapter, if its user still has it."""
        fields = ("id", "recipe", "sha256", "raw")
        name = keys.adapter(adapter_id.user_key)
        values = await self._connection.run(lambda redis: redis.hmget(name, fields), WRITE_TIMEOUT_S)
        if values[0] is None or values[0].decode() != adapter_id.id:
            return None
        return StoredAdapter(adapter_id.id, values[1].decode(), values[2].decode(), values[3])

    async def adapter_id(self, user_key: str) -> str | None:
        """The `id` of the adapter that a user has now."""
        value = await self._connection.run(lambda redis: redis.hget(keys.adapter(user_key), "id"))
        return value.decode() if value is not None else None

    async def put_temporary(self, user_key: str, stored: StoredAdapter, ttl_s: int) -> None:
        """Keep an adapter that belongs to nobody for `ttl_s`, so that engines can serve it."""
        fields = ("id", stored.id, "recipe", stored.recipe, "sha256", stored.sha256, "raw", stored.raw)
        await self._connection.write(_PUT_TEMPORARY, (keys.adapter(user_key),), ttl_s, *fields)

    async def add_adapted(self, user_key: str, bank: str) -> None:
        """Put a user on a bank's list, for good: in a cluster nothing that is written for the user makes it last."""
        await self._connection.write(_ADD_MEMBER, (keys.BANKS,), bank)
        await self._connection.write(_ADD_MEMBER, (keys.adapted(bank),), user_key)

    async def banks(self) -> list[str]:
        """The banks (8 hex digits) that users were ever queued for, or user adapters trained on."""
        banks = await self._connection.run(lambda redis: redis.smembers(keys.BANKS))
        return sorted(value.decode() for value in banks)

    async def adapted(self) -> dict[str, int]:
        """The banks that user adapters were trained on, with the number of users of each."""
        banks = await self.banks()
        counts = [await self._connection.run(methodcaller("scard", keys.adapted(bank))) for bank in banks]
        return {bank: count for bank, count in zip(banks, counts, strict=True) if count}

    async def adapted_users(self, bank: str) -> AsyncIterator[str]:
        """The keys of users whose adapter was trained on a bank; by now some may have another, or none."""
        name, after = keys.adapted(bank), 0
        while True:
            after, members = await self._connection.run(methodcaller("sscan", name, after, count=_BATCH))
            for member in members:
                yield member.decode()
            if after == 0:
                return

    async def remove_adapted(self, user_key: str, *, except_bank: str = "") -> None:
        """Take a user off every bank's list, except that of `but`."""
        for bank in await self.banks():
            if bank != except_bank:
                await self._connection.run(methodcaller("srem", keys.adapted(bank), user_key))
