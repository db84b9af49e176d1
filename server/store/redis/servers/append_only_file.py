"""The append-only file holds erased data until it is rewritten: requested at every erasure, done at most hourly.

A server has a file. The hash `keys.rewrite(server)` holds its state, in ms: when a rewrite was last `asked` for; when
the next is `due`; when the `last` successful one began; when the one in progress `began`, the server's `run` and its
`count` of rewrites before; how many `failures` there were in a row, and when to `retry`.

It is requested *before* a user is erased, so that a crash in between cannot leave the file as it was. The erasure
follows within `ERASE_MS` or not at all: only a successful rewrite that began later than that settles what is due.
"""

from __future__ import annotations

import asyncio
import logging

import orjson
from redis.exceptions import ResponseError

from server.errors import Unavailable
from server.store.durability import REWRITE_CHECK_S, Rewrite
from server.store.redis import keys
from server.store.redis.scripts import oom_script, script
from server.store.redis.servers.base import StoreServer
from server.store.redis.servers.connection import RedisConnection

log = logging.getLogger("mta.store")

INTERVAL_MS = 3_600_000  # shortest time between the starts of two rewrites
ERASE_MS = 60_000  # how soon after the request the erasure must happen
CLOCK_SKEW_MS = 10_000  # maximum difference between the clocks of a cluster's servers
START_MS = 30_000  # a gateway that has claimed a rewrite and not begun it within this time never will
REWRITE_MS = 600_000  # how long a rewrite is assumed to take in the promised time
RETRY_MS = 60_000  # until a failed rewrite is tried again; each further failure doubles it, up to `INTERVAL_MS`

# KEYS: rewrite. ARGV: interval, time to erase (ms). Returns the time, and when a rewrite is due that is sure to begin
# after the erasure: the one that is already due may begin too early.
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

_FAIL = """
local function failed(first, longest)
  redis.call('HDEL', KEYS[1], 'began', 'run', 'count')
  local failures = redis.call('HINCRBY', KEYS[1], 'failures', 1)
  redis.call('HSET', KEYS[1], 'retry', now + math.min(first * 2 ^ (failures - 1), longest))
  return -failures
end
"""

# KEYS: rewrite. ARGV: time until the next try, interval (ms). Returns how often rewrites have failed, below zero.
_REFUSED = oom_script(
    _FAIL
    + """
if redis.call('HEXISTS', KEYS[1], 'began') == 1 then return failed(tonumber(ARGV[1]), tonumber(ARGV[2])) end
return -tonumber(redis.call('HGET', KEYS[1], 'failures') or 0)
"""
)

# KEYS: rewrite. ARGV: how long a rewrite may take (ms). Returns for how long one should have been done, ms.
_OVERDUE = script("""
return math.max(0, now - (redis.call('HGET', KEYS[1], 'due') or now) - ARGV[1])
""")

# KEYS: rewrite. Returns 1 if the caller should begin a rewrite now, 0 if nobody should; below zero, how often rewrites
# have failed in a row, one of them just now. A time too far ahead to have been set by this clock counts as reached.
_ADVANCE = oom_script(
    _FAIL
    + """
local run, count, well, times = ARGV[1], ARGV[2], ARGV[3], cjson.decode(ARGV[4])
local function get(field) return redis.call('HGET', KEYS[1], field) end

local began = tonumber(get('began'))
if began then
  local same = get('run') == run
  if same and tonumber(get('count')) >= tonumber(count) then  -- nobody has begun it
    if now >= began and now - began < times.to_begin then return 0 end
    redis.call('HDEL', KEYS[1], 'began', 'run', 'count')
  elseif not same or well ~= '1' then
    return failed(times.to_retry, times.interval)
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
if due > now and due < now + 2 * times.interval then return 0 end
if retry > now and retry <= now + times.interval then return 0 end
redis.call('HSET', KEYS[1], 'began', now, 'run', run, 'count', count)
return 1
"""
)


class AppendOnlyFile:
    """`server.store.durability.RewritableFile` on Redis."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def request_rewrite(self, user_key: str) -> Rewrite:
        states = [keys.rewrite(server) for server in await self._connection.holders(keys.profile(user_key))]
        asked = [await self._connection.write(_REQUEST, (state,), INTERVAL_MS, ERASE_MS) for state in states]
        now_ms, due_ms = min(now for now, _ in asked), max(due for _, due in asked)
        return Rewrite(now_ms + ERASE_MS - CLOCK_SKEW_MS, due_ms + _max_rewrite_ms())

    async def overdue_s(self) -> float:
        states = [(keys.rewrite(server.id),) for server in await self._connection.members()]
        late_ms = [int(await self._connection.evaluate(_OVERDUE, state, _max_rewrite_ms())) for state in states]
        return max(late_ms, default=0) / 1000

    async def rewrite_if_due(self) -> None:
        members = await self._connection.members()
        looked = await asyncio.gather(*map(self._check_server, members), return_exceptions=True)
        for error in looked:  # that one server is away keeps nobody from looking at the others
            if error is not None:
                raise error

    async def _check_server(self, server: StoreServer) -> None:
        state, info = keys.rewrite(server.id), await self._connection.send(server, "INFO")
        if info.get("aof_rewrite_in_progress") or info.get("aof_rewrite_scheduled"):
            return
        run, count = str(info["run_id"]), int(info.get("aof_rewrites", 0))
        well = int(info.get("aof_last_bgrewrite_status") == "ok")
        times = {"interval": INTERVAL_MS, "to_erase": ERASE_MS, "to_begin": START_MS, "to_retry": RETRY_MS}
        outcome = int(await self._connection.write(_ADVANCE, (state,), run, count, well, orjson.dumps(times)))
        if outcome < 0:
            _log_failure(server, -outcome, "it did not end well, which its own log says more of")
        if outcome > 0:
            await self._begin(server, enabled=bool(info.get("aof_enabled")))

    async def _begin(self, server: StoreServer, *, enabled: bool) -> None:
        state = keys.rewrite(server.id)
        if not enabled:  # there is no file
            held = ("began", "run", "count", "due", "failures", "retry")
            await self._connection.run(lambda redis: redis.hdel(state, *held))
            return
        try:
            await self._connection.send(server, "BGREWRITEAOF")
        except Unavailable as error:
            if not isinstance(error.__cause__, ResponseError):
                raise
            # Another is running, or a managed service does it on its own.
            failures = -int(await self._connection.write(_REFUSED, (state,), RETRY_MS, INTERVAL_MS))
            _log_failure(server, failures, str(error.__cause__))


def _max_rewrite_ms() -> int:
    """How long after it is due a rewrite is done at the latest, if nothing goes wrong."""
    return round(2 * REWRITE_CHECK_S * 1000) + REWRITE_MS


def _log_failure(server: StoreServer, failures: int, why: str) -> None:
    log.error(
        "the append-only file%s still holds erased users: rewriting it failed %d times in a row (%s), and is tried "
        "again in %.0f s",
        f" of {server.id}" if server.id else "",
        failures,
        why,
        min(RETRY_MS * 2 ** (failures - 1), INTERVAL_MS) / 1000,
    )
