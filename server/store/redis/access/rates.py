"""Limits on Redis: token buckets, and leases as sorted sets.

None of it is waited for until it is on disk: at worst a crash forgives what was used in the last seconds. A full store
counts too: what is counted is small and expires, and whoever filled the store is to be held to their limits.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.store.redis import keys
from server.store.redis.job_scripts import ALLOW_OOM, NOW
from server.store.redis.servers.connection import RedisConnection
from server.store.tenants.rates import BucketLevel, BucketLevels, Use

# KEYS: a bucket for each use: how much is used, and when that was so, µs. It expires when nothing is.
# ARGV: whether to count whatever is left, then of each use most, window (µs) and amount.
# Returns of each whether there was room, and what is used. If not for all, nothing is counted.
_CONSUME = (
    ALLOW_OOM
    + """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local fit, used, ahead, all = {}, {}, {}, true
for i = 1, #KEYS do
  local most, window, amount = tonumber(ARGV[i * 3 - 1]), tonumber(ARGV[i * 3]), tonumber(ARGV[i * 3 + 1])
  local known = redis.call('GET', KEYS[i])
  used[i] = 0
  if known then
    local before, at = string.match(known, '^(%S+) (%S+)$')
    local leaked = math.max(0, now - tonumber(at)) * most / window
    used[i] = math.max(0, math.min(most, tonumber(before)) - leaked)
    ahead[i] = tonumber(at) > now  -- the clock was set back: from now on it leaks again
  end
  fit[i] = used[i] + amount <= most
  all = all and fit[i]
end
local answer = {}
for i = 1, #KEYS do
  local most, window, amount = tonumber(ARGV[i * 3 - 1]), tonumber(ARGV[i * 3]), tonumber(ARGV[i * 3 + 1])
  local counts = amount ~= 0 and (ARGV[1] == '1' or all)
  if counts then used[i] = math.max(0, math.min(most, used[i] + amount)) end
  local left_ms = math.ceil(used[i] * window / most / 1000)
  if (counts or ahead[i]) and left_ms > 0 then
    redis.call('SET', KEYS[i], string.format('%.17g %.0f', used[i], now), 'PX', left_ms)
  elseif counts then
    redis.call('DEL', KEYS[i])
  end
  answer[i * 2 - 1], answer[i * 2] = fit[i] and 1 or 0, string.format('%.17g', used[i])
end
return answer
"""
)

# KEYS: who holds it, by when that ends. ARGV: most (-1: any number), lease (ms), members. Returns how many hold it, or
# -1 if there is no room.
_ACQUIRE = (
    ALLOW_OOM
    + NOW
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
    ALLOW_OOM
    + NOW
    + """
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], 'XX', now + ARGV[1], ARGV[i]) end
return redis.call('PEXPIRE', KEYS[1], ARGV[1])
"""
)


class RedisRates:
    """`server.store.tenants.rates.Rates` on Redis."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def consume(self, uses: Sequence[Use]) -> BucketLevels:
        return await self._count(uses, anyway=False)

    async def correct(self, uses: Sequence[Use]) -> None:
        await self._count(uses, anyway=True)

    async def acquire(self, name: str, members: Sequence[str], lease_s: float, most: int | None = None) -> int | None:
        allowed, lease_ms = -1 if most is None else most, int(lease_s * 1000)
        count = await self._connection.run(
            lambda redis: redis.eval(_ACQUIRE, 1, keys.held(name), allowed, lease_ms, *members)
        )
        return None if count < 0 else int(count)

    async def renew(self, name: str, members: Sequence[str], lease_s: float) -> None:
        await self._connection.run(lambda redis: redis.eval(_RENEW, 1, keys.held(name), int(lease_s * 1000), *members))

    async def release(self, name: str, member: str) -> None:
        await self._connection.run(lambda redis: redis.zrem(keys.held(name), member))

    async def _count(self, uses: Sequence[Use], *, anyway: bool) -> BucketLevels:
        names = [keys.rate(use.rate.owner, use.rate.what) for use in uses]
        given = [number for use in uses for number in (use.rate.most, use.rate.window_s * 1_000_000, use.amount)]
        found = await self._connection.run(lambda redis: redis.eval(_CONSUME, len(names), *names, int(anyway), *given))
        levels = [BucketLevel(use.rate, float(used)) for use, used in zip(uses, found[1::2], strict=True)]
        return BucketLevels([bool(fit) for fit in found[0::2]], levels)
