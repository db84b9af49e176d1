"""The append-only file holds what was erased until it is rewritten: asked for at every erasure, done hourly at most.

mta:{rewrite}:due    string   when the next rewrite is due, ms; absent when nothing was erased since the last
mta:{rewrite}:last   string   when the last one began, ms
"""

from __future__ import annotations

import asyncio
import logging

from redis.exceptions import ResponseError

from server.errors import ApiError
from server.store.redis_connection import WRITE_TIMEOUT_S, RedisConnection
from server.store.redis_scripts import NOW

log = logging.getLogger("mta.store")

INTERVAL_S = 3600
LOOK_S = 60.0

# KEYS: due, last. ARGV: shortest time between two (ms). Answers when a rewrite will have begun.
_ASK = (
    NOW
    + """
local last = tonumber(redis.call('GET', KEYS[2]) or 0)
redis.call('SET', KEYS[1], math.max(now, last + ARGV[1]), 'NX')
return tonumber(redis.call('GET', KEYS[1]))
"""
)

# KEYS: due, last. Answers whether the caller shall begin one.
_TAKE = (
    NOW
    + """
local due = tonumber(redis.call('GET', KEYS[1]) or now + 1)
if due > now then return 0 end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[2], now)
return 1
"""
)

_DUE, _LAST = "mta:{rewrite}:due", "mta:{rewrite}:last"


class AppendOnlyFile:
    """Has Redis forget on disk too what it has forgotten."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def ask_for_rewrite(self) -> int:
        """Have it rewritten; by when, Unix time in milliseconds."""
        due_ms: int = await self._connection.write(_ASK, (_DUE, _LAST), INTERVAL_S * 1000)
        return due_ms + round(LOOK_S * 1000)

    async def rewrite_if_due(self) -> bool:
        """Begin a rewrite that is due; whether one was begun. Of all gateways one does it."""
        if not await self._connection.write(_TAKE, (_DUE, _LAST)):
            return False
        async with self._connection.pipeline(transaction=False, timeout_s=WRITE_TIMEOUT_S) as pipe:
            pipe.execute_command("BGREWRITEAOF")
            (answer,) = await pipe.execute(raise_on_error=False)
        if isinstance(answer, ResponseError):  # one is running, or a managed service does it by itself
            log.warning("the append-only file is not rewritten now: %s", answer)
        return not isinstance(answer, ResponseError)

    async def watch(self) -> None:
        """Look every minute, for as long as the gateway runs."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.rewrite_if_due()
            except ApiError as error:
                log.warning("%s", error.explained)
