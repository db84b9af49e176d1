"""Limits on Redis: sliding windows, and leases as sorted sets.

None of it is waited for until it is on disk: at worst a crash forgives what was used in the last seconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from server.store.redis import keys
from server.store.redis.job_scripts import NOW
from server.store.redis.servers.connection import RedisConnection
from server.store.tenants.rates import Left, Rate

if TYPE_CHECKING:
    from server.store.redis.access.windows import Windows

# KEYS: who holds it, by when that ends. ARGV: most (-1: any number), lease (ms), members. Returns how many hold it, or
# -1 if there is no room.
_HOLD = (
    NOW
    + """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local most, lease = tonumber(ARGV[1]), tonumber(ARGV[2])
for i = 3, #ARGV do
  local known = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if not known and most >= 0 and redis.call('ZCARD', KEYS[1]) >= most then return -1 end
  redis.call('ZADD', KEYS[1], now + lease, ARGV[i])
end
redis.call('PEXPIRE', KEYS[1], lease)
return redis.call('ZCARD', KEYS[1])
"""
)

# KEYS: who holds it. ARGV: lease (ms), members. Whoever is not among the holders stays without.
_RENEW = (
    NOW
    + """
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], 'XX', now + ARGV[1], ARGV[i]) end
return redis.call('PEXPIRE', KEYS[1], ARGV[1])
"""
)


class RedisRates:
    """`server.store.tenants.rates.Rates` on Redis."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._opened: Windows | None = None

    async def take(self, rate: Rate, amount: int) -> bool:
        return bool(await self._connection.run(lambda redis: self._windows(redis).take(rate, amount)))

    async def left(self, rate: Rate) -> Left:
        amount, more_at_s = await self._connection.run(lambda redis: self._windows(redis).left(rate))
        return Left(min(int(amount), rate.most), max(0.0, more_at_s - time.time()))

    async def hold(self, name: str, members: Sequence[str], lease_s: float, most: int | None = None) -> int | None:
        allowed, lease_ms = -1 if most is None else most, int(lease_s * 1000)
        count = await self._connection.run(
            lambda redis: redis.eval(_HOLD, 1, keys.held(name), allowed, lease_ms, *members)
        )
        return None if count < 0 else int(count)

    async def renew(self, name: str, members: Sequence[str], lease_s: float) -> None:
        await self._connection.run(lambda redis: redis.eval(_RENEW, 1, keys.held(name), int(lease_s * 1000), *members))

    async def let_go(self, name: str, member: str) -> None:
        await self._connection.run(lambda redis: redis.zrem(keys.held(name), member))

    def _windows(self, redis: Any) -> Windows:
        if self._opened is None:
            from server.store.redis.access.windows import Windows  # whoever limits nothing need not load the library

            self._opened = Windows(redis)
        return self._opened
