"""The append-only file holds erased data until it is rewritten: requested at every erasure, done at most hourly.

Each server has a file of its own. The hash `keys.rewrite(server)` holds its state, with times in ms: `asked`, when a
rewrite was last requested; `due`, when the next is due, absent when all requests are done; `last`, when the last
successful one began; and for the one in progress, when it `began`, the server's `run`, and its `count` of rewrites
before.

A rewrite is requested *before* a user is erased, so that a crash in between cannot leave the file as it was. The
erasure follows within `ASKED_MS` or not at all. So a successful rewrite that began later than that after the request
has left out what was erased; only such a rewrite settles what is due. In a cluster that concerns the primary that
holds the user, and its replicas; the times are by the clock of whichever server holds the states.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from redis.exceptions import ResponseError

from server.errors import Unavailable
from server.store.durability import LOOK_S, Asked
from server.store.redis import keys
from server.store.redis.job_scripts import ALLOW_OOM, NOW
from server.store.redis.servers.base import Server
from server.store.redis.servers.connection import RedisConnection

log = logging.getLogger("mta.store")

INTERVAL_MS = 3_600_000
"""Shortest time between the starts of two rewrites."""

ASKED_MS = 60_000
"""How soon after the request the erasure must happen."""

CLOCKS_MS = 10_000
"""How far apart the clocks of a cluster's servers may be: the erasure's deadline is judged by another."""

BEGIN_MS = 30_000
"""A gateway that has claimed a rewrite and not begun it within this time never will."""

REWRITE_MS = 600_000
"""How long a rewrite is assumed to take in the promised time."""

# KEYS: rewrite. ARGV: interval, time to erase (ms). Returns the time, and when a rewrite is due that is sure to begin
# after the erasure: the one that is already due may begin too early.
_ASK = (
    ALLOW_OOM
    + NOW
    + """
redis.call('HSET', KEYS[1], 'asked', now)
local from = now + ARGV[2]
local due = tonumber(redis.call('HGET', KEYS[1], 'due'))
if not due then
  local last = math.min(now, tonumber(redis.call('HGET', KEYS[1], 'last') or 0))
  due = math.max(from, last + ARGV[1])
  redis.call('HSET', KEYS[1], 'due', due)
end
local began = redis.call('HEXISTS', KEYS[1], 'began') == 1
if began or due < from then due = math.max(due, now) + ARGV[1] end
return {now, due}
"""
)

# KEYS: rewrite. ARGV: the server's run, its count of rewrites, interval. Returns whether the caller should begin
# one now. A time too far ahead to have been set by this clock counts as reached.
_TAKE = (
    ALLOW_OOM
    + NOW
    + """
local due = tonumber(redis.call('HGET', KEYS[1], 'due') or now + 1)
if due > now and due < now + 2 * ARGV[3] then return 0 end
redis.call('HSET', KEYS[1], 'began', now, 'run', ARGV[1], 'count', ARGV[2])
return 1
"""
)

# KEYS: rewrite. ARGV: the server's run, its count of rewrites, whether the last succeeded, interval, time to erase,
# time to begin (ms). Returns whether the caller may begin one: not while another is about to.
_SETTLE = (
    ALLOW_OOM
    + NOW
    + """
local began = tonumber(redis.call('HGET', KEYS[1], 'began'))
if not began then return 1 end
local same = redis.call('HGET', KEYS[1], 'run') == ARGV[1]
local counted = tonumber(redis.call('HGET', KEYS[1], 'count')) < tonumber(ARGV[2])
if same and not counted and now >= began and now - began < tonumber(ARGV[6]) then return 0 end
redis.call('HDEL', KEYS[1], 'began', 'run', 'count')
if not (same and counted and ARGV[3] == '1') then return 1 end
redis.call('HSET', KEYS[1], 'last', began)
local from = tonumber(redis.call('HGET', KEYS[1], 'asked') or 0) + ARGV[5]
if from <= began then
  redis.call('HDEL', KEYS[1], 'due')
else
  redis.call('HSET', KEYS[1], 'due', math.max(from, began + ARGV[4]))
end
return 1
"""
)


class AppendOnlyFile:
    """`server.store.durability.ForgetsOnDisk` on Redis."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def ask_for_rewrite(self, user_key: str) -> Asked:
        """Request a rewrite of the files that leaves out what is about to be erased of a user."""
        return await self._ask(await self._connection.holders(keys.profile(user_key)))

    async def look(self) -> None:
        """Settle a rewrite that has ended and begin one that is due. Only one of all gateways does so."""
        members = await self._connection.members()
        if await self._connection.run(lambda redis: redis.exists(keys.OLD_REWRITE)):
            await self._ask([server.id for server in members])
            await self._connection.run(lambda redis: redis.delete(keys.OLD_REWRITE))
        looked = await asyncio.gather(*map(self._look_at, members), return_exceptions=True)
        for error in looked:  # that one server is away keeps nobody from looking at the others
            if error is not None:
                raise error

    async def _ask(self, servers: Sequence[str]) -> Asked:
        states = [keys.rewrite(server) for server in servers]
        asked = [await self._connection.write(_ASK, (state,), INTERVAL_MS, ASKED_MS) for state in states]
        now_ms, due_ms = min(now for now, _ in asked), max(due for _, due in asked)
        return Asked(now_ms + ASKED_MS - CLOCKS_MS, due_ms + round(2 * LOOK_S * 1000) + REWRITE_MS)

    async def _look_at(self, server: Server) -> None:
        state, info = keys.rewrite(server.id), await self._connection.ask(server, "INFO")
        if info.get("aof_rewrite_in_progress") or info.get("aof_rewrite_scheduled"):
            return
        run, count = str(info["run_id"]), int(info.get("aof_rewrites", 0))
        well = int(info.get("aof_last_bgrewrite_status") == "ok")
        if not await self._connection.write(_SETTLE, (state,), run, count, well, INTERVAL_MS, ASKED_MS, BEGIN_MS):
            return
        if await self._connection.write(_TAKE, (state,), run, count, INTERVAL_MS):
            await self._begin(server, enabled=bool(info.get("aof_enabled")))

    async def _begin(self, server: Server, *, enabled: bool) -> None:
        state = keys.rewrite(server.id)
        if not enabled:  # there is no file
            await self._connection.run(lambda redis: redis.hdel(state, "began", "run", "count", "due"))
            return
        try:
            await self._connection.ask(server, "BGREWRITEAOF")
        except Unavailable as error:
            if not isinstance(error.__cause__, ResponseError):
                raise
            # Another is running, or a managed service does it on its own.
            log.warning("the append-only file is not rewritten now: %s", error.__cause__)
            await self._connection.run(lambda redis: redis.hdel(state, "began", "run", "count"))
