"""What tenants with a quota hold, counted from what was measured of each person.

The count of a tenant is a hash of all its people, so a measurement may be noted twice. It is wrong about those whose
measurement was lost, until they are measured again. Writes do not wait for the disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from operator import methodcaller

from server.errors import Unavailable
from server.store.base import Store
from server.store.redis import keys
from server.store.redis.scripts import script
from server.store.redis.servers.connection import RedisConnection
from server.store.tenants.rates import Quota, Rates, Use

KEPT_S = 7 * 24 * 3600  # after the last change, as when a tenant no longer has a quota
SCANNED = 100  # keys that one step of a scan looks at
_USER_KEY_CHARS = 26

Held = Counter[str]
"""What one person has in the store, or several: `people` of whom anything is stored, `bytes` and `adapters`, also those
that are being trained."""

_NOTE = script("holdings/note", runs_when_full=True)


class HoldingStore(Store):
    """Keeps the counts."""

    def __init__(self, connection: RedisConnection) -> None:
        super().__init__(connection)
        self._rates = Rates(connection)

    async def note(self, tenant: str, people: Mapping[str, Held]) -> None:
        """Replace what people of a tenant hold, by user key."""
        told: list[object] = [KEPT_S]
        for user_key, held in people.items():
            told += (user_key, f"{held['bytes']} {held['adapters']}" if held["people"] else "")
        await self._connection.evaluate(_NOTE, (keys.count(tenant),), *told)

    async def is_counted(self, tenant: str) -> bool:
        return bool(await self._connection.run(methodcaller("exists", keys.count(tenant))))

    async def count(self, tenant: str, quota: Quota) -> Held:
        """Return what a tenant holds, and the `tokens` of its quota that are used."""
        fields = ("people", "bytes", "adapters")
        stored = await self._connection.run(methodcaller("hmget", keys.count(tenant), fields))
        held = Held({name: int(value or 0) for name, value in zip(fields, stored, strict=True)})
        if rate := quota.daily_tokens(tenant):
            held["tokens"] = int((await self._rates.consume([Use(rate, 0)]))[0].used)
        return held

    async def all_people(self, tenants: Iterable[str]) -> AsyncIterator[tuple[str, list[str]]]:
        """Yield the keys of all users who have a profile, whose tenant is not known, and of those counted by tenant."""
        if self._connection.unserved:
            raise Unavailable(self._connection.unserved)
        for server in await self._connection.members():
            if (await self._connection.send(server, "ROLE"))[0] == b"master":
                async for names in self._connection.names(server, keys.profile("*"), SCANNED):
                    yield "", [user_key for user_key in map(keys.user_of, names) if user_key]
        for tenant in tenants:
            position = None
            while position != 0:
                scan = methodcaller("hscan", keys.count(tenant), position or 0, count=SCANNED)
                position, fields = await self._connection.run(scan)
                yield tenant, [name.decode() for name in fields if len(name) == _USER_KEY_CHARS]
