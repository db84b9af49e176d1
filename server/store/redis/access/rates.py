"""Limits on Redis: windows are those of the library `limits`, over the stores' own connections; leases are sorted sets.

None of it is waited for until it is on disk: at worst a crash forgives what was used in the last seconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from limits import RateLimitItem, RateLimitItemPerSecond
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from server.store.redis import keys
from server.store.redis.job_scripts import NOW
from server.store.redis.servers.connection import RedisConnection
from server.store.tenants.rates import Left, Rate

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


class RedisRates:
    """`server.store.tenants.rates.Rates` on Redis."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._limiter: SlidingWindowCounterRateLimiter | None = None

    async def take(self, rate: Rate, amount: int) -> bool:
        taken: bool = await self._connection.run(
            lambda redis: self._windows(redis).hit(_item(rate), rate.owner, cost=amount)
        )
        return taken

    async def left(self, rate: Rate) -> Left:
        stats = await self._connection.run(lambda redis: self._windows(redis).get_window_stats(_item(rate), rate.owner))
        return Left(min(int(stats.remaining), rate.most), max(0.0, stats.reset_time - time.time()))

    async def hold(self, name: str, members: Sequence[str], lease_s: float, most: int | None = None) -> int | None:
        allowed, lease_ms = -1 if most is None else most, int(lease_s * 1000)
        count = await self._connection.run(
            lambda redis: redis.eval(_HOLD, 1, keys.held(name), allowed, lease_ms, *members)
        )
        return None if count < 0 else int(count)

    async def let_go(self, name: str, member: str) -> None:
        await self._connection.run(lambda redis: redis.zrem(keys.held(name), member))

    def _windows(self, redis: Any) -> SlidingWindowCounterRateLimiter:
        if self._limiter is None:
            self._limiter = SlidingWindowCounterRateLimiter(_Shared(redis))
        return self._limiter


class _Shared(RedisStorage):
    """The library's storage over a client that is there already, be it a cluster's or not."""

    STORAGE_SCHEME = None  # type: ignore[assignment]  # not one that the library finds by a URL

    def __init__(self, client: Any) -> None:
        self._client = client
        super().__init__("redis://", implementation="redispy", key_prefix=keys.RATES)

    def configure_bridge(self) -> None:
        self.bridge.storage = self._client  # type: ignore[attr-defined]
        self.bridge.connection_getter = lambda readonly: self._client  # type: ignore[attr-defined]


def _item(rate: Rate) -> RateLimitItem:
    return RateLimitItemPerSecond(rate.most, rate.window_s, namespace=rate.what)
