"""Work queues: sorted sets of users, scored by the time when a worker should check each user's record.

`take` returns the first due user and postpones the entry by `GRACE_MS`, so that another worker retries if the first one
dies. A worker postpones the entry while it is busy, and removes it when no work is left, unless new work was added
meanwhile. A request that is about to create work first reserves an entry of its own, `<user key>+<random>`. If the
request dies, that entry becomes due; changes to the user's entry do not affect it.

Tenants take turns (start-time fair queueing): a user who is added waits with a negative score, made of the tenant's
next turn and the second. A tenant's next turn comes after its last one, and never before the one being served.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from server.errors import Unavailable
from server.store.base import Store
from server.store.redis import keys
from server.store.redis.scripts import Script, script
from server.store.redis.servers.connection import RedisConnection

POLL_S = 0.4  # seconds between polls of an idle worker: one command, no write
GRACE_MS = 10_000  # time a worker has to start on a user it has taken before another worker may take the user
RESERVED_MS = 60_000  # time a request has to create its work after reserving an entry

# KEYS of every script: foreground set, background set, attempts, turns. Times come from the server's clock alone.
_RESERVE = script("queue/reserve")
_ADD = script("queue/add")
_TAKE = script("queue/take", runs_when_full=True)
_UPDATE = script("queue/update", runs_when_full=True)
_BACKLOG = script("queue/backlog")
_COUNT_ATTEMPT = script("queue/count_attempt")


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
    oldest_s: float  # waiting time of the next job, which is its tenant's oldest; 0 if none waits


class UserQueue(Store):
    """Queue for one kind of work and one bank (8 hex digits)."""

    def __init__(self, connection: RedisConnection, work: keys.Work, bank: str) -> None:
        super().__init__(connection)
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

    async def add(
        self, user_key: str, reservation: Reservation | None = None, *, tenant: str = "", background: bool = False
    ) -> None:
        """Let a user wait for the tenant's next turn, and drop the reservation."""
        await self._register_bank()
        await self._write(_ADD, 1 + background, user_key, reservation.entry if reservation else "", tenant)

    async def take(self, wait_s: float) -> str | None:
        """Wait for a due user. The user may have been erased or served already."""
        until_s = time.monotonic() + wait_s
        while (left_s := until_s - time.monotonic()) > 0:
            if taken := await self._run(_TAKE, GRACE_MS, 2 * (RESERVED_MS + GRACE_MS)):
                user_key: str = taken[0].decode()
                self._scores[user_key] = int(taken[1])
                return user_key
            await asyncio.sleep(min(POLL_S, left_s))
        return None

    async def postpone(self, user_key: str, wait_ms: int) -> None:
        """Make a user due again after `wait_ms`. Errors are ignored: a worker then only checks the user too early."""
        with suppress(Unavailable):
            self._scores[user_key] = int(await self._run(_UPDATE, user_key, self._scores.get(user_key, 0), wait_ms))

    async def remove(self, user_key: str) -> None:
        """Remove a user, unless the user was added again since this process last saw their score."""
        await self._write(_UPDATE, user_key, self._scores.pop(user_key, 0))

    async def remember_score(self, user_key: str) -> None:  # for `remove`
        self._scores[user_key] = int(await self._run(_UPDATE, user_key, 0, 0))

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

    async def _write(self, script: Script, *arguments: object) -> Any:
        return await self._connection.write(script, self._keys, *arguments)

    async def _run(self, script: Script, *arguments: object) -> Any:  # its changes need not be durable
        return await self._connection.evaluate(script, self._keys, *arguments)

    async def _register_bank(self) -> None:
        """Add the bank to those whose queues an erasure cleans."""
        if not self._is_bank_registered:
            await self._connection.run(lambda redis: redis.sadd(keys.BANKS, self._bank))
            self._is_bank_registered = True
