"""The Lua scripts of queues (`queue.py`), each on the keys of one queue. The server's clock is the only one used."""

from __future__ import annotations

from server.store.redis.job_scripts import ALLOW_OOM, NOW

# KEYS: open, listed. ARGV: user key, time until the check (ms). Returns when it was listed, never the same twice.
ENLIST = (
    NOW
    + """
local listed = math.max(now, tonumber(redis.call('ZSCORE', KEYS[2], ARGV[1]) or 0) + 1)
redis.call('ZADD', KEYS[2], listed, ARGV[1])
redis.call('ZADD', KEYS[1], listed + ARGV[2], ARGV[1])
return listed
"""
)

# KEYS: calls, called, open, listed. ARGV: user key, grace (ms), when it was listed by the caller, group. Returns
# whether a call was made: not while one is unread. One that was read and not acknowledged is replaced.
CALL = (
    NOW
    + """
redis.call('ZADD', KEYS[3], now + ARGV[2], ARGV[1])
if redis.call('ZSCORE', KEYS[4], ARGV[1]) == ARGV[3] then redis.call('ZREM', KEYS[4], ARGV[1]) end
local entry = redis.call('HGET', KEYS[2], ARGV[1])
if entry then
  local read = redis.pcall('XPENDING', KEYS[1], ARGV[4], entry, entry, 1)
  if #read > 0 then
    redis.call('XACK', KEYS[1], ARGV[4], entry)
    redis.call('XDEL', KEYS[1], entry)
  elseif #redis.call('XRANGE', KEYS[1], entry, entry) > 0 then
    return 0
  end
end
redis.call('HSET', KEYS[2], ARGV[1], redis.call('XADD', KEYS[1], '*', 'id', ARGV[1]))
return 1
"""
)

# KEYS: open, begun. ARGV: user key. Returns how often a worker has begun; 0, uncounted, for a user who is not in the
# queue: nothing would ever remove what is counted of somebody who was erased meanwhile.
BEGIN = """
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
return redis.call('HINCRBY', KEYS[2], ARGV[1], 1)
"""

# KEYS: calls, called, begun. ARGV: user key, group, entry. Whoever acknowledges has survived what they began.
ACKNOWLEDGE = """
redis.call('XACK', KEYS[1], ARGV[2], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
if redis.call('HGET', KEYS[2], ARGV[1]) == ARGV[3] then redis.call('HDEL', KEYS[2], ARGV[1]) end
redis.call('HDEL', KEYS[3], ARGV[1])
return 1
"""

# KEYS: open. ARGV: furthest time ahead that is ever set (ms), most results. Returns the time, then who is due and when.
DUE = (
    NOW
    + """
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'WITHSCORES', 'LIMIT', 0, ARGV[2])
local ahead = redis.call('ZRANGEBYSCORE', KEYS[1], now + 2 * ARGV[1], '+inf', 'WITHSCORES', 'LIMIT', 0, ARGV[2])
for _, text in ipairs(ahead) do due[#due + 1] = text end
return {now, due}
"""
)

# KEYS: calls, called, open, listed, begun. ARGV: user key, group, the appointment that the caller saw, how long a
# listing holds (ms). A user who was called or listed since has another appointment, and keeps it.
CLOSE = (
    ALLOW_OOM
    + NOW
    + """
if (redis.call('ZSCORE', KEYS[3], ARGV[1]) or '') ~= ARGV[3] then return 0 end
local listed = tonumber(redis.call('ZSCORE', KEYS[4], ARGV[1]) or now - ARGV[4])
if now - listed < tonumber(ARGV[4]) and now >= listed - ARGV[4] then
  redis.call('ZADD', KEYS[3], listed + ARGV[4], ARGV[1])
  return 0
end
for i = 3, 4 do redis.call('ZREM', KEYS[i], ARGV[1]) end
local entry = redis.call('HGET', KEYS[2], ARGV[1])
if entry then
  redis.pcall('XACK', KEYS[1], ARGV[2], entry)
  redis.call('XDEL', KEYS[1], entry)
end
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[5], ARGV[1])
return 1
"""
)

# KEYS: calls. Returns for how long the oldest call has been there, ms; 0 without one. An entry's id begins with when it
# was made.
OLDEST = (
    NOW
    + """
local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
return first and math.max(0, now - tonumber(string.match(first[1], '^%d+'))) or 0
"""
)
