"""Work queues: sorted sets of users, scored by the time when a worker should check each user's record.

`take` returns the first due user and postpones the entry by `GRACE_MS`, so that another worker retries if the first one
dies. A worker postpones the entry while it is busy, and removes it when no work is left, unless new work was added
meanwhile. A request that is about to create work first reserves an entry of its own, `<user key>+<random>`. If the
request dies, that entry becomes due; changes to the user's entry do not affect it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from server.errors import Unavailable
from server.store.redis import keys
from server.store.redis.scripts import oom_script, script
from server.store.redis.servers.connection import RedisConnection

POLL_S = 0.4  # seconds between polls of an idle worker: one command, no write
GRACE_MS = 10_000  # time a worker has to start on a user it has taken before another worker may take the user
RESERVED_MS = 60_000  # time a request has to create its work after reserving an entry

# KEYS of every script: foreground set, background set, attempts. Times come from the server's clock alone.

_RESERVE = script("""
local set, entry, ahead = KEYS[tonumber(ARGV[1])], ARGV[2], ARGV[3]
redis.call('ZADD', set, now + ahead, entry)
return now
""")

# A waiting user keeps their position but gets a new score, so a worker that remembers the old one removes nothing.
_ADD = script("""
local class, user, listed = tonumber(ARGV[1]), ARGV[2], ARGV[3]
local due = tonumber(redis.call('ZSCORE', KEYS[class], user) or now + 1)
redis.call('ZADD', KEYS[class], due <= now and due + 1 or now, user)
redis.call('ZREM', KEYS[3 - class], user)
redis.call('ZREM', KEYS[class], listed)
return 1
""")

# An entry further in the future than any entry this clock creates was added before the clock was set back.
_TAKE = oom_script("""
local grace, furthest = unpack(ARGV)
for class = 1, 2 do
  local found = redis.call('ZRANGEBYSCORE', KEYS[class], '-inf', now, 'LIMIT', 0, 1)[1]
    or redis.call('ZRANGEBYSCORE', KEYS[class], now + furthest, '+inf', 'LIMIT', 0, 1)[1]
  if found then
    local user = string.match(found, '^[^+]+')
    for each = 1, 2 do redis.call('ZREM', KEYS[each], found, user) end
    redis.call('ZADD', KEYS[class], now + grace, user)
    return {user, now + grace}
  end
end
return {}
""")

# Postpone an entry by the given ms, or remove it if none are given, provided that it has the score the caller saw.
# Returns its new score, or -1 if there is no entry.
_UPDATE = oom_script("""
local user, seen, wait = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
if not wait then redis.call('HDEL', KEYS[3], user) end
for class = 1, 2 do
  local due = tonumber(redis.call('ZSCORE', KEYS[class], user) or -1)
  if due >= 0 and due ~= seen then return due end
  if due >= 0 and wait then
    redis.call('ZADD', KEYS[class], now + wait, user)
    return now + wait
  end
  redis.call('ZREM', KEYS[class], user)
end
return -1
""")

_BACKLOG = script("""
local all, due, first = 0, 0, now
for class = 1, 2 do
  all = all + redis.call('ZCARD', KEYS[class])
  due = due + redis.call('ZCOUNT', KEYS[class], '-inf', now)
  first = math.min(first, tonumber(redis.call('ZRANGE', KEYS[class], 0, 0, 'WITHSCORES')[2] or now))
end
return {all, due, now - first}
""")

# Do not count a user who has left the queue: nothing would ever remove an erased user's count.
_COUNT_ATTEMPT = """
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
return redis.call('HINCRBY', KEYS[3], ARGV[1], 1)
"""


@dataclass(frozen=True, slots=True)
class Reservation:
    """A request's own queue entry, and its deadline for creating the work (server time)."""

    name: str
    entry: str
    until_ms: int


@dataclass(frozen=True, slots=True)
class Backlog:
    """Approximate amount of work that a bank's workers have."""

    open: int  # unfinished jobs
    waiting: int  # unfinished jobs that no worker has claimed
    oldest_s: float  # waiting time of the oldest waiting job; 0 if none waits


class UserQueue:
    """Queue for one kind of work and one bank (8 hex digits). Methods raise `Unavailable` as the other stores do."""

    def __init__(self, connection: RedisConnection, work: keys.Work, bank: str) -> None:
        self._connection = connection
        self._bank = bank
        self._keys = keys.queue(work, bank)
        self._scores: dict[str, int] = {}  # by user key: the last score of the entry that this process saw
        self._is_bank_registered = False

    async def reserve(self, user_key: str, *, background: bool = False) -> Reservation:
        """Reserve an entry before creating work, so that a worker checks the user even if this process dies."""
        await self._register_bank()
        entry = f"{user_key}+{secrets.token_hex(4)}"
        now_ms = await self._write(_RESERVE, 1 + background, entry, RESERVED_MS + GRACE_MS)
        return Reservation(self._keys[background], entry, int(now_ms) + RESERVED_MS)

    async def cancel_reservation(self, reservation: Reservation) -> None:
        """Remove a reservation for which no work was created. Errors are ignored: a worker then finds nothing to do."""
        with suppress(Unavailable):
            await self._connection.run(lambda redis: redis.zrem(reservation.name, reservation.entry))

    async def add(self, user_key: str, reservation: Reservation | None = None, *, background: bool = False) -> None:
        """Make a user due now, and drop the reservation."""
        await self._register_bank()
        await self._write(_ADD, 1 + background, user_key, reservation.entry if reservation else "")

    async def take(self, wait_s: float) -> str | None:
        """Wait for a due user. The user may have been erased or served already."""
        until_s = time.monotonic() + wait_s
        while (left_s := until_s - time.monotonic()) > 0:
            if found := await self._run(_TAKE, GRACE_MS, 2 * (RESERVED_MS + GRACE_MS)):
                user_key: str = found[0].decode()
                self._scores[user_key] = int(found[1])
                return user_key
            await asyncio.sleep(min(POLL_S, left_s))
        return None

    async def postpone(self, user_key: str, wait_ms: int) -> None:
        """Make a user due again after `wait_ms`. Errors are ignored: a worker then only checks the user too early."""
        with suppress(Unavailable):
            self._scores[user_key] = int(await self._run(_UPDATE, user_key, self._scores.get(user_key, -1), wait_ms))

    async def remove(self, user_key: str) -> None:
        """Remove a user, unless the user was added again since this process last saw their score."""
        await self._write(_UPDATE, user_key, self._scores.pop(user_key, -1))

    async def remember_score(self, user_key: str) -> None:  # for `remove`
        self._scores[user_key] = int(await self._run(_UPDATE, user_key, -2, 0))

    def forget_score(self, user_key: str) -> None:
        self._scores.pop(user_key, None)

    async def remove_erased(self, user_key: str) -> None:
        await self.remember_score(user_key)
        await self.remove(user_key)

    async def backlog(self) -> Backlog:
        all_, due, oldest_ms = await self._run(_BACKLOG)
        return Backlog(all_, due, oldest_ms / 1000)

    async def count_attempt(self, user_key: str) -> int:
        """Count an attempt; return the number since the last `remove`, from 1, or 0 if the user is not queued."""
        return int(await self._run(_COUNT_ATTEMPT, user_key))

    async def forget_attempts(self, user_key: str) -> None:
        await self._connection.run(lambda redis: redis.hdel(self._keys[2], user_key))

    async def _write(self, script: str, *arguments: object) -> Any:
        return await self._connection.write(script, self._keys, *arguments)

    async def _run(self, script: str, *arguments: object) -> Any:  # its changes need not be durable
        return await self._connection.evaluate(script, self._keys, *arguments)

    async def _register_bank(self) -> None:
        """Add the bank to those whose queues an erasure cleans."""
        if not self._is_bank_registered:
            await self._connection.run(lambda redis: redis.sadd(keys.BANKS, self._bank))
            self._is_bank_registered = True
