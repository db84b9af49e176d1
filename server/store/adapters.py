"""User adapters, one key per user, and the sets of users by bank."""

from __future__ import annotations

import secrets
from base64 import b32encode
from collections.abc import AsyncIterator
from dataclasses import dataclass
from operator import methodcaller

from adapters.recipe import UserAdapterId
from server.store.base import Store
from server.store.redis import keys
from server.store.redis.servers.base import WRITE_TIMEOUT_S

_BATCH = 100

# KEYS: a set. ARGV: the member. Always writes, because the store does not wait for a script that changes nothing.
_ADD_MEMBER = """
redis.call('SREM', KEYS[1], ARGV[1])
return redis.call('SADD', KEYS[1], ARGV[1])
"""


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A user adapter: the recipe it was trained on, and its bytes as encoded by `adapters.user_adapter`."""

    id: str
    recipe: str
    sha256: str  # of the bytes, 64 hex digits
    raw: bytes


def new_adapter_id() -> str:
    """Return 128 random bits as 26 base32 characters, the format that recipe names require."""
    return b32encode(secrets.token_bytes(16)).decode().rstrip("=").lower()


class AdapterStore(Store):
    """Stores user adapters."""

    async def adapter(self, adapter_id: UserAdapterId) -> StoredAdapter | None:
        """Return an adapter if it is still its user's current one."""
        fields = ("id", "recipe", "sha256", "raw")
        name = keys.adapter(adapter_id.user_key)
        # An adapter of a large model has megabytes, so reading one may take as long as a write.
        values = await self._connection.run(lambda redis: redis.hmget(name, fields), WRITE_TIMEOUT_S)
        if values[0] is None or values[0].decode() != adapter_id.id:
            return None
        return StoredAdapter(adapter_id.id, values[1].decode(), values[2].decode(), values[3])

    async def adapter_id(self, user_key: str) -> str | None:  # of the user's current adapter
        value = await self._connection.run(lambda redis: redis.hget(keys.adapter(user_key), "id"))
        return value.decode() if value is not None else None

    async def add_adapted(self, user_key: str, bank: str) -> None:
        """Add a user to a bank's set durably: in a cluster, a durable write to the user's keys does not cover it."""
        await self._connection.write(_ADD_MEMBER, (keys.BANKS,), bank)
        await self._connection.write(_ADD_MEMBER, (keys.adapted(bank),), user_key)

    async def banks(self) -> list[str]:
        """Return all banks (8 hex digits) that had queued users or trained user adapters."""
        banks = await self._connection.run(lambda redis: redis.smembers(keys.BANKS))
        return sorted(value.decode() for value in banks)

    async def adapted(self) -> dict[str, int]:
        """Return the number of users with an adapter, by the bank it was trained on."""
        banks = await self.banks()
        counts = [await self._connection.run(methodcaller("scard", keys.adapted(bank))) for bank in banks]
        return {bank: count for bank, count in zip(banks, counts, strict=True) if count}

    async def adapted_users(self, bank: str) -> AsyncIterator[str]:
        """Yield the keys of users whose adapter was trained on a bank. Some may have another adapter or none by now."""
        cursor = None
        while cursor != 0:
            scan = methodcaller("sscan", keys.adapted(bank), cursor or 0, count=_BATCH)
            cursor, members = await self._connection.run(scan)
            for member in members:
                yield member.decode()

    async def remove_adapted(self, user_key: str, *, except_bank: str = "") -> None:
        """Remove a user from every bank's set except that of `except_bank`."""
        for bank in await self.banks():
            if bank != except_bank:
                await self._connection.run(methodcaller("srem", keys.adapted(bank), user_key))
