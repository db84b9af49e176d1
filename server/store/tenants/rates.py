"""Limits: token buckets, and leases as sorted sets, which count for all gateways together.

Nothing waits for the disk: a crash forgives what was used in the last seconds. A full store counts too, since it is
small and expires, and whoever filled the store is to be held to their limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from server.store.redis import keys
from server.store.redis.scripts import oom_script

if TYPE_CHECKING:
    from server.store.redis.servers.connection import RedisConnection  # commands start without redis-py

MINUTE_S = 60
DAY_S = 24 * 3600


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one key, or one user, may use: requests and tokens in a minute, adapt jobs in a day, requests at once.
    0 for any amount, None where nothing was said."""

    requests: int | None = None
    tokens: int | None = None
    jobs: int | None = None
    concurrent: int | None = None

    def with_defaults(self, usual: Allowance) -> Allowance:
        """What holds where nothing was said is as usual."""
        return replace(usual, **self.overrides) if self.overrides else usual

    @property
    def overrides(self) -> dict[str, int]:
        """What was said, by name."""
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}


NO_OVERRIDES = Allowance()


@dataclass(frozen=True, slots=True)
class Rate:
    """A limit: within a window an owner, whose name shows no user id, may use `most` requests, tokens or jobs."""

    what: str
    owner: str
    most: int
    window_s: int = MINUTE_S


@dataclass(frozen=True, slots=True)
class Use:
    """Some of what a rate allows; below zero, some that is given back."""

    rate: Rate
    amount: int


@dataclass(frozen=True, slots=True)
class BucketLevel:
    """How much of a rate is used at a moment: 0 to `most`; it falls evenly, by all of `most` within the window."""

    rate: Rate
    used: float

    @property
    def left(self) -> int:
        """How much can be used now."""
        return int(self.rate.most - self.used)

    def fits_in_s(self, amount: int) -> float:
        """In how many seconds so much can be used."""
        return max(0.0, self.used + amount - self.rate.most) * self.rate.window_s / self.rate.most


@dataclass(frozen=True, slots=True)
class BucketLevels:
    """What came of some uses: which of them there was room for, and the level of each one's rate afterwards. They were
    counted if there was room for all."""

    fit: Sequence[bool]
    levels: Sequence[BucketLevel]

    @property
    def counted(self) -> bool:
        return all(self.fit)


# KEYS: a bucket for each use: how much is used, and when that was so, µs. It expires when nothing is.
# ARGV: whether to count whatever is left, then of each use most, window (µs) and amount.
# Returns of each whether there was room, and what is used. If not for all, nothing is counted.
_CONSUME = oom_script("""
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
""")

# KEYS: who holds it, by when that ends. ARGV: most (-1: any number), lease (ms), members. Returns how many hold it, or
# -1 if there is no room.
_ACQUIRE = oom_script("""
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local most, lease = tonumber(ARGV[1]), tonumber(ARGV[2])
for i = 3, #ARGV do
  local known = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if not known and most >= 0 and redis.call('ZCARD', KEYS[1]) >= most then return -1 end
  redis.call('ZADD', KEYS[1], now + lease, ARGV[i])
end
redis.call('PEXPIRE', KEYS[1], lease)
return redis.call('ZCARD', KEYS[1])
""")

# KEYS: who holds it. ARGV: lease (ms), members. Whoever is not among the holders stays without.
_RENEW = oom_script("""
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], 'XX', now + ARGV[1], ARGV[i]) end
return redis.call('PEXPIRE', KEYS[1], ARGV[1])
""")


class Rates:
    """A rate is a bucket: what is used leaks out evenly, and after a window without use the whole limit is there at
    once, never more. Every method raises `Unavailable` when the store cannot be reached."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def consume(self, uses: Sequence[Use]) -> BucketLevels:
        """Use all, or nothing if too little is left of one rate: all of one owner, no rate twice. 0 only asks."""
        return await self._count(uses, anyway=False)

    async def correct(self, uses: Sequence[Use]) -> None:
        """Count so much more or less of an owner's rates, whatever is left: no level leaves 0 to `most`."""
        await self._count(uses, anyway=True)

    async def acquire(self, name: str, members: Sequence[str], lease_s: float, most: int | None = None) -> int | None:
        """Be among those who hold something, for `lease_s` or until `release`; calling it again renews that.

        Returns how many hold it now; None if there is no room for all of the members among `most`.
        """
        allowed, lease_ms = -1 if most is None else most, int(lease_s * 1000)
        count = await self._connection.evaluate(_ACQUIRE, (keys.held(name),), allowed, lease_ms, *members)
        return None if count < 0 else int(count)

    async def renew(self, name: str, members: Sequence[str], lease_s: float) -> None:
        """Hold it for `lease_s` from now. A member that has been released, or never held it, stays without."""
        await self._connection.evaluate(_RENEW, (keys.held(name),), int(lease_s * 1000), *members)

    async def release(self, name: str, member: str) -> None:
        await self._connection.run(lambda redis: redis.zrem(keys.held(name), member))

    async def _count(self, uses: Sequence[Use], *, anyway: bool) -> BucketLevels:
        names = [keys.rate(use.rate.owner, use.rate.what) for use in uses]
        given = [number for use in uses for number in (use.rate.most, use.rate.window_s * 1_000_000, use.amount)]
        found = await self._connection.evaluate(_CONSUME, names, int(anyway), *given)
        levels = [BucketLevel(use.rate, float(used)) for use, used in zip(uses, found[1::2], strict=True)]
        return BucketLevels([bool(fit) for fit in found[0::2]], levels)
