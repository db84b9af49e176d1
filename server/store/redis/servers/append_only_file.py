"""The append-only file holds erased data until it is rewritten: requested at every erasure, done at most hourly.

The hash `keys.REWRITE` holds the state, with times in ms: `asked`, when a rewrite was last requested; `due`, when the
next is due, absent when all requests are done; `last`, when the last successful one began; and for the one in progress,
when it `began`, the server's `run`, and its `count` of rewrites before.

A rewrite is requested *before* a user is erased, so that a crash in between cannot leave the file as it was. The
erasure follows within `ASKED_MS` or not at all. So a successful rewrite that began later than that after the request
has left out what was erased; only such a rewrite settles what is due.
"""

from __future__ import annotations

import logging

from redis.exceptions import ResponseError

from server.store.durability import LOOK_S, Asked
from server.store.redis import keys
from server.store.redis.job_scripts import NOW
from server.store.redis.servers.connection import RedisConnection

log = logging.getLogger("mta.store")

INTERVAL_MS = 3_600_000
"""Shortest time between the starts of two rewrites."""

ASKED_MS = 60_000
"""How soon after the request the erasure must happen."""

BEGIN_MS = 30_000
"""A gateway that has claimed a rewrite and not begun it within this time never will."""

REWRITE_MS = 600_000
"""How long a rewrite is assumed to take in the promised time."""

# KEYS: rewrite. ARGV: interval, time to erase (ms). Returns the time, and when a rewrite is due that is sure to begin
# after the erasure: the one that is already due may begin too early.
_ASK = (
    NOW
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
    NOW
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
    NOW
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

    async def ask_for_rewrite(self) -> Asked:
        """Request a rewrite of the file that leaves out what is about to be erased."""
        now_ms, due_ms = await self._connection.write(_ASK, (keys.REWRITE,), INTERVAL_MS, ASKED_MS)
        return Asked(now_ms + ASKED_MS, due_ms + round(2 * LOOK_S * 1000) + REWRITE_MS)

    async def look(self) -> None:
        """Settle a rewrite that has ended and begin one that is due. Only one of all gateways does so."""
        if await self._connection.run(lambda redis: redis.exists(keys.OLD_REWRITE)):
            await self.ask_for_rewrite()
            await self._connection.run(lambda redis: redis.delete(keys.OLD_REWRITE))
        server = await self._connection.run(lambda redis: redis.info())
        if server.get("aof_rewrite_in_progress") or server.get("aof_rewrite_scheduled"):
            return
        run, count = str(server["run_id"]), int(server.get("aof_rewrites", 0))
        well = int(server.get("aof_last_bgrewrite_status") == "ok")
        settled = (run, count, well, INTERVAL_MS, ASKED_MS, BEGIN_MS)
        if not await self._connection.write(_SETTLE, (keys.REWRITE,), *settled):
            return
        if await self._connection.write(_TAKE, (keys.REWRITE,), run, count, INTERVAL_MS):
            await self._begin(enabled=bool(server.get("aof_enabled")))

    async def _begin(self, *, enabled: bool) -> None:
        if not enabled:  # there is no file
            await self._connection.run(lambda redis: redis.hdel(keys.REWRITE, "began", "run", "count", "due"))
            return
        async with self._connection.pipeline(transaction=False) as pipe:
            pipe.execute_command("BGREWRITEAOF")
            (answer,) = await pipe.execute(raise_on_error=False)
        if isinstance(answer, ResponseError):  # another is running, or a managed service does it on its own
            log.warning("the append-only file is not rewritten now: %s", answer)
            await self._connection.run(lambda redis: redis.hdel(keys.REWRITE, "began", "run", "count"))
