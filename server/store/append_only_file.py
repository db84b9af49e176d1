"""Rewrites the append-only file, so that erased data leaves the disk. Every erasure requests one, at most hourly.

Each server has its own file. The hash `keys.rewrite(server)` holds its state, times in ms: last request (`asked`), next
rewrite (`due`), start of the `last` successful one, start of the current one (`began`) with the server's `run` id and
earlier rewrites (`count`), consecutive `failures`, and the time of the next `retry`.

A rewrite is requested *before* a user is erased, so that a crash in between cannot leave the file unchanged. Erasure
happens within `ERASE_MS` or not at all, so only a successful rewrite that started after that time clears `due`.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import orjson

from server.errors import Unavailable
from server.store.redis import keys
from server.store.redis.scripts import oom_script, script
from server.store.redis.servers.base import StoreServer
from server.store.redis.servers.connection import REFUSED, RedisConnection

log = logging.getLogger("mta.store")

REWRITE_CHECK_S = 10.0  # seconds between a gateway's checks whether a rewrite is due
INTERVAL_MS = 3_600_000  # minimum time between the starts of two rewrites
ERASE_MS = 60_000  # time from the request within which the erasure must happen
CLOCK_SKEW_MS = 10_000  # maximum clock difference in a cluster: another server's clock judges the deadline
START_MS = 30_000  # time a gateway has to start a rewrite that it has claimed
REWRITE_MS = 600_000  # assumed duration of a rewrite, part of the promised time
RETRY_MS = 60_000  # delay after a failed rewrite; doubled by each further failure, up to `INTERVAL_MS`

# KEYS: rewrite. ARGV: interval, time to erase (ms). Returns the current time, and when a rewrite is due that is sure to
# start after the erasure: the one already due may start too early.
_REQUEST = oom_script("""
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
""")

# KEYS: rewrite. ARGV: allowed duration of a rewrite (ms). Returns how late a due rewrite is, ms.
_OVERDUE = script("""
return math.max(0, now - (redis.call('HGET', KEYS[1], 'due') or now) - ARGV[1])
""")

# KEYS: rewrite. ARGV: the server's run id (empty if it refused to begin the rewrite), number of rewrites, whether the
# last one succeeded, times as JSON. Returns 1 if the caller should start a rewrite now, 0 if not, the negated number
# of consecutive failures if one just failed. An implausibly late time counts as reached: the clock was set back.
_ADVANCE = oom_script("""
local run, count, succeeded, times = ARGV[1], ARGV[2], ARGV[3], cjson.decode(ARGV[4])
local function get(field) return redis.call('HGET', KEYS[1], field) end

local began = tonumber(get('began'))
if began then
  local same = get('run') == run
  if same and tonumber(get('count')) >= tonumber(count) then  -- not started yet
    if now >= began and now - began < times.to_begin then return 0 end
    redis.call('HDEL', KEYS[1], 'began', 'run', 'count')
  elseif not same or succeeded ~= '1' then
    redis.call('HDEL', KEYS[1], 'began', 'run', 'count')
    local failures = redis.call('HINCRBY', KEYS[1], 'failures', 1)
    redis.call('HSET', KEYS[1], 'retry', now + math.min(times.to_retry * 2 ^ (failures - 1), times.interval))
    return -failures
  else
    redis.call('HDEL', KEYS[1], 'began', 'run', 'count', 'failures', 'retry')
    redis.call('HSET', KEYS[1], 'last', began)
    local from = tonumber(get('asked') or 0) + times.to_erase
    if from <= began then
      redis.call('HDEL', KEYS[1], 'due')
    else
      redis.call('HSET', KEYS[1], 'due', math.max(from, began + times.interval))
    end
  end
end

local due, retry = tonumber(get('due') or now + 1), tonumber(get('retry') or 0)
if run == '' or due > now and due < now + 2 * times.interval then return 0 end
if retry > now and retry <= now + times.interval then return 0 end
redis.call('HSET', KEYS[1], 'began', now, 'run', run, 'count', count)
return 1
""")


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A requested rewrite. Times are Unix time by the store's clock."""

    erase_by_ms: int  # deadline for erasing the data that the rewrite must leave out
    rewritten_by_ms: int  # when the erased data is gone from the file at the latest


class AppendOnlyFile:
    """The files of all servers."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def request_rewrite(self, user_key: str) -> Rewrite:
        """Request a rewrite that leaves out a user about to be erased. If it raises `Unavailable`, erase nothing."""
        states = [keys.rewrite(server) for server in await self._connection.holders(keys.profile(user_key))]
        asked = [await self._connection.write(_REQUEST, (state,), INTERVAL_MS, ERASE_MS) for state in states]
        now_ms, due_ms = min(now for now, _ in asked), max(due for _, due in asked)
        return Rewrite(now_ms + ERASE_MS - CLOCK_SKEW_MS, due_ms + _max_rewrite_ms())

    async def overdue_s(self) -> float:
        """Return how many seconds a promised rewrite is late; 0 if none is."""
        states = [(keys.rewrite(server.id),) for server in await self._connection.members()]
        late_ms = [int(await self._connection.evaluate(_OVERDUE, state, _max_rewrite_ms())) for state in states]
        return max(late_ms, default=0) / 1000

    async def rewrite_if_due(self) -> None:
        """Record the result of a finished rewrite and start one that is due. Only one gateway at a time does so."""
        members = await self._connection.members()
        results = await asyncio.gather(*map(self._check_server, members), return_exceptions=True)
        for error in results:  # raise only after all servers were checked
            if error is not None:
                raise error

    async def _check_server(self, server: StoreServer) -> None:
        info = await self._connection.send(server, "INFO")
        if info.get("aof_rewrite_in_progress") or info.get("aof_rewrite_scheduled"):
            return
        run, count = str(info["run_id"]), int(info.get("aof_rewrites", 0))
        succeeded = info.get("aof_last_bgrewrite_status") == "ok"
        if await self._advance(server, "see the server's log", run, count, succeeded=succeeded):
            await self._begin(server, enabled=bool(info.get("aof_enabled")))

    async def _advance(
        self, server: StoreServer, why: str, run: str = "", count: int = 0, *, succeeded: bool = False
    ) -> bool:
        """Return whether to start a rewrite now. If the last one failed, log `why`."""
        times = {"interval": INTERVAL_MS, "to_erase": ERASE_MS, "to_begin": START_MS, "to_retry": RETRY_MS}
        given = (run, count, int(succeeded), orjson.dumps(times))
        outcome = int(await self._connection.write(_ADVANCE, (keys.rewrite(server.id),), *given))
        if outcome < 0:
            log.error(
                "the append-only file%s still contains erased users: its rewrite failed %d times in a row (%s); next "
                "attempt in %.0f s",
                f" of {server.id}" if server.id else "",
                -outcome,
                why,
                min(RETRY_MS * 2 ** (-outcome - 1), INTERVAL_MS) / 1000,
            )
        return outcome > 0

    async def _begin(self, server: StoreServer, *, enabled: bool) -> None:
        if not enabled:  # there is no file
            held = ("began", "run", "count", "due", "failures", "retry")
            await self._connection.run(lambda redis: redis.hdel(keys.rewrite(server.id), *held))
            return
        try:
            await self._connection.send(server, "BGREWRITEAOF")
        except Unavailable as error:
            if error.code != REFUSED:
                raise
            # Another rewrite is running, or a managed service rewrites the file itself.
            await self._advance(server, error.message)


def _max_rewrite_ms() -> int:
    """Longest time from due to finished in normal operation."""
    return round(2 * REWRITE_CHECK_S * 1000) + REWRITE_MS
