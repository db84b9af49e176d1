"""Queues (keys: `server/store/redis/keys.py`): they say when a worker is to look at whose record.

Taking the first user that is due moves that entry on by `GRACE_MS`: if nothing comes of it the next worker looks again.
After a look it is moved on while a worker is busy, or removed when nothing is left to do, unless the user was requested
meanwhile. A request that is about to create work first adds an entry of its own, `<user key>+<random>`, which falls due
and is taken like any other if the request dies; nothing that happens to the user's own entry touches it.
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

POLL_S = 0.4  # how often an idle worker looks whether anybody is due: one command, and nothing is written
GRACE_MS = 10_000  # how long a worker that has taken a user has to begin, until others look again
RESERVED_MS = 60_000  # how long a request has to create the work that it listed a user for

# KEYS of all: the set of what is due, that of the background, tries. The server's clock is the only one used.

_RESERVE = script("""
local set, entry, ahead = KEYS[tonumber(ARGV[1])], ARGV[2], ARGV[3]
redis.call('ZADD', set, now + ahead, entry)
return now
""")

# Who waits already keeps their place, but not their score: whoever has seen that would remove the entry.
_ADD = script("""
local class, user, listed = tonumber(ARGV[1]), ARGV[2], ARGV[3]
local due = tonumber(redis.call('ZSCORE', KEYS[class], user) or now + 1)
redis.call('ZADD', KEYS[class], due <= now and due + 1 or now, user)
redis.call('ZREM', KEYS[3 - class], user)
redis.call('ZREM', KEYS[class], listed)
return 1
""")

# An entry further ahead than this clock ever sets one was made before it was set back.
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

# Moves an entry on by so many ms, or removes it where none are given, if it still has the score that the caller saw.
# Returns its score after that, -1 without one.
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

# Nothing would ever remove what is counted of somebody who was erased meanwhile.
_COUNT_ATTEMPT = """
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
return redis.call('HINCRBY', KEYS[3], ARGV[1], 1)
"""


@dataclass(frozen=True, slots=True)
class Reservation:
    """A request's own entry in a set, and until when the request may create its work, by the server's clock."""

    name: str
    entry: str
    until_ms: int


@dataclass(frozen=True, slots=True)
class Backlog:
    """About how much a bank's workers have to do."""

    open: int  # jobs that have not ended
    waiting: int  # those that no worker has
    oldest_s: float  # how long the first of these has waited; 0 without one


class UserQueue:
    """Users who wait for work of one kind, for one bank (8 hex digits), each once; the background comes after all else.

    Methods raise `Unavailable` when the store cannot be used.
    """

    def __init__(self, connection: RedisConnection, work: keys.Work, bank: str) -> None:
        self._connection = connection
        self._bank = bank
        self._keys = keys.queue(work, bank)
        self._scores: dict[str, int] = {}  # by user key: the entry's score when this process last took or moved it
        self._is_bank_registered = False

    async def reserve(self, user_key: str, *, background: bool = False) -> Reservation:
        """Announce that work is about to be created: a worker is to look even if nobody calls."""
        await self._register_bank()
        entry = f"{user_key}+{secrets.token_hex(4)}"
        now_ms = await self._write(_RESERVE, 1 + background, entry, RESERVED_MS + GRACE_MS)
        return Reservation(self._keys[background], entry, int(now_ms) + RESERVED_MS)

    async def cancel_reservation(self, reservation: Reservation) -> None:
        """No work was created after all. Without a store the entry falls due, and nothing comes of it."""
        with suppress(Unavailable):
            await self._connection.run(lambda redis: redis.zrem(reservation.name, reservation.entry))

    async def add(self, user_key: str, reservation: Reservation | None = None, *, background: bool = False) -> None:
        """Have a worker look at a user now."""
        await self._register_bank()
        await self._write(_ADD, 1 + background, user_key, reservation.entry if reservation else "")

    async def take(self, wait_s: float) -> str | None:
        """Wait for a user who is due; by now they may be gone, or have what they were to get."""
        until_s = time.monotonic() + wait_s
        while (left_s := until_s - time.monotonic()) > 0:
            if found := await self._run(_TAKE, GRACE_MS, 2 * (RESERVED_MS + GRACE_MS)):
                user_key: str = found[0].decode()
                self._scores[user_key] = int(found[1])
                return user_key
            await asyncio.sleep(min(POLL_S, left_s))
        return None

    async def postpone(self, user_key: str, wait_ms: int) -> None:
        """Look at a user again after so long. It is no fault if this fails: then somebody looks too early."""
        with suppress(Unavailable):
            self._scores[user_key] = int(await self._run(_UPDATE, user_key, self._scores.get(user_key, -1), wait_ms))

    async def remove(self, user_key: str) -> None:
        """Look at a user no more, unless they were requested since this process last took or moved or saw them."""
        await self._write(_UPDATE, user_key, self._scores.pop(user_key, -1))

    async def remember_score(self, user_key: str) -> None:
        """Note when a user is due, for `done` or `leave`."""
        self._scores[user_key] = int(await self._run(_UPDATE, user_key, -2, 0))

    def forget_score(self, user_key: str) -> None:
        """Leave a user to others."""
        self._scores.pop(user_key, None)

    async def remove_erased(self, user_key: str) -> None:
        """Remove an erased user."""
        await self.remember_score(user_key)
        await self.remove(user_key)

    async def backlog(self) -> Backlog:
        all_, due, oldest_ms = await self._run(_BACKLOG)
        return Backlog(all_, due, oldest_ms / 1000)

    async def count_attempt(self, user_key: str) -> int:
        """Count an attempt; returns how many there were since `done`, from 1; 0 for who has left the queue."""
        return int(await self._run(_COUNT_ATTEMPT, user_key))

    async def _write(self, script: str, *arguments: object) -> Any:
        return await self._connection.write(script, self._keys, *arguments)

    async def _run(self, script: str, *arguments: object) -> Any:
        """A script whose changes need not last."""
        return await self._connection.evaluate(script, self._keys, *arguments)

    async def _register_bank(self) -> None:
        """Put the bank on the list of those whose queues an erasure looks into, once for all users."""
        if not self._is_bank_registered:
            await self._connection.run(lambda redis: redis.sadd(keys.BANKS, self._bank))
            self._is_bank_registered = True
