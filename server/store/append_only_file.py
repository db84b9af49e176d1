"""Rewrites the append-only file, so that erased data leaves the disk. Every erasure requests one, at most hourly.

So does the end of an exchange of MTA_SECRET: a later erasure does not reach the server that the user has left.

Each server has its own file. The hash `keys.rewrite(server)` holds its state, times in ms:
- `asked`: when the last request begins to count; `due`: the next rewrite; `last`: the start of the last successful one;
- `began`, `run`, `count`: when a gateway claimed the current rewrite, the server's run id, and its rewrites until then;
- `failures`: failed rewrites since the last successful one; `retry`: the next attempt.

A rewrite is requested *before* a user is erased, so that a crash in between cannot leave the file unchanged. Erasure
happens within `ERASE_MS` or not at all, so only a successful rewrite that started after that time clears `due`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
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

# KEYS: rewrite. ARGV: interval, time to erase, time until the request begins to count (ms). Returns the current time,
# and when a rewrite is due that is sure to start after the erasure. The rewrite that is already due or claimed may
# start before it.
_REQUEST = oom_script("""
local asked, before = now + ARGV[3], tonumber(redis.call('HGET', KEYS[1], 'asked') or 0)
if before <= now + ARGV[1] then asked = math.max(asked, before) end  -- else the clock was set back
redis.call('HSET', KEYS[1], 'asked', asked)
local erased_by = asked + ARGV[2]
local due = tonumber(redis.call('HGET', KEYS[1], 'due'))
if not due then
  local last = math.min(now, tonumber(redis.call('HGET', KEYS[1], 'last') or 0))
  due = math.max(erased_by, last + ARGV[1])
  redis.call('HSET', KEYS[1], 'due', due)
end
local is_claimed = redis.call('HEXISTS', KEYS[1], 'began') == 1
if is_claimed or due < erased_by then due = math.max(due, now) + ARGV[1] end
return {now, due}
""")

# KEYS: rewrite. ARGV: allowed duration of a rewrite (ms). Returns how late a due rewrite is, ms.
_OVERDUE = script("""
return math.max(0, now - (redis.call('HGET', KEYS[1], 'due') or now) - ARGV[1])
""")

# KEYS: rewrite. ARGV: JSON (`AppendOnlyFile._update`) with the server's run id, its number of rewrites, and whether the
# last one succeeded; or `refused` if the server did not start the claimed rewrite. Returns {'wait'}, {'start'} if the
# caller should start a rewrite now, or {'failed', consecutive failures, delay of the next attempt (ms)}.
_UPDATE = oom_script("""
local given = cjson.decode(ARGV[1])
local function get(field) return redis.call('HGET', KEYS[1], field) end
local function drop_claim() redis.call('HDEL', KEYS[1], 'began', 'run', 'count') end
local function record_failure()
  drop_claim()
  local failures = redis.call('HINCRBY', KEYS[1], 'failures', 1)
  local delay_ms = math.min(given.retry_ms * 2 ^ (failures - 1), given.interval_ms)
  redis.call('HSET', KEYS[1], 'retry', now + delay_ms)
  return {'failed', failures, delay_ms}
end
local function record_success(began)
  drop_claim()
  redis.call('HDEL', KEYS[1], 'failures', 'retry')
  redis.call('HSET', KEYS[1], 'last', began)
  local erased_by = tonumber(get('asked') or 0) + given.erase_ms
  if erased_by <= began then
    redis.call('HDEL', KEYS[1], 'due')
  else
    redis.call('HSET', KEYS[1], 'due', math.max(erased_by, began + given.interval_ms))
  end
end
-- A time further ahead counts as reached: the clock was set back.
local function is_ahead(time, max_ms) return time > now and time <= now + max_ms end

local began = tonumber(get('began'))  -- first step: settle the claimed rewrite
if given.refused then return began and record_failure() or {'wait'} end
if began then
  local is_same_run = get('run') == given.run
  if is_same_run and given.rewrites <= tonumber(get('count')) then  -- the server has not started it
    if now >= began and now - began < given.start_ms then return {'wait'} end
    drop_claim()
  elseif is_same_run and given.succeeded then
    record_success(began)
  else
    return record_failure()
  end
end

local due, retry = tonumber(get('due')), tonumber(get('retry') or 0)  -- second step: claim the next one if it is due
if not due or is_ahead(due, 2 * given.interval_ms) or is_ahead(retry, given.interval_ms) then return {'wait'} end
redis.call('HSET', KEYS[1], 'began', now, 'run', given.run, 'count', given.rewrites)
return {'start'}
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
        answers = await self._request(await self._connection.holders(keys.profile(user_key)))
        requested_ms = min(now_ms for now_ms, _ in answers)
        due_ms = max(due_ms for _, due_ms in answers)
        return Rewrite(requested_ms + ERASE_MS - CLOCK_SKEW_MS, due_ms + _max_rewrite_ms())

    async def request_all(self, in_ms: int) -> None:
        """Request a rewrite of every server's file that leaves out what will have expired by then."""
        await self._request([server.id for server in await self._connection.members()], in_ms)

    async def _request(self, servers: Iterable[str], in_ms: int = 0) -> list[tuple[int, int]]:
        times = (INTERVAL_MS, ERASE_MS, in_ms)
        return [await self._connection.write(_REQUEST, (keys.rewrite(server),), *times) for server in servers]

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
        succeeded = info.get("aof_last_bgrewrite_status") == "ok"
        report = {"run": str(info["run_id"]), "rewrites": int(info.get("aof_rewrites", 0)), "succeeded": succeeded}
        if await self._update(server, "see the server's log", **report) == b"start":
            await self._start(server, enabled=bool(info.get("aof_enabled")))

    async def _start(self, server: StoreServer, *, enabled: bool) -> None:
        if not enabled:  # there is no file to rewrite
            fields = ("began", "run", "count", "due", "failures", "retry")
            await self._connection.run(lambda redis: redis.hdel(keys.rewrite(server.id), *fields))
            return
        try:
            await self._connection.send(server, "BGREWRITEAOF")
        except Unavailable as error:
            if error.code != REFUSED:
                raise
            # Another rewrite is running, or a managed service rewrites the file itself.
            await self._update(server, error.message, refused=True)

    async def _update(self, server: StoreServer, reason: str, **report: object) -> bytes:
        """Update a server's state and return what to do, as `_UPDATE` does; log a failed rewrite with `reason`."""
        times = {"interval_ms": INTERVAL_MS, "erase_ms": ERASE_MS, "start_ms": START_MS, "retry_ms": RETRY_MS}
        given = orjson.dumps(times | report)
        outcome, *failure = await self._connection.write(_UPDATE, (keys.rewrite(server.id),), given)
        if failure:
            failures, delay_ms = failure
            log.error(
                "the append-only file%s still contains erased users: its rewrite failed %d times in a row (%s); next "
                "attempt in %.0f s",
                f" of {server.id}" if server.id else "",
                failures,
                reason,
                delay_ms / 1000,
            )
        return bytes(outcome)


def _max_rewrite_ms() -> int:
    """Longest time from due to finished in normal operation."""
    return round(2 * REWRITE_CHECK_S * 1000) + REWRITE_MS
