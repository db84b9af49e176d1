"""The Lua scripts of jobs: each changes one user's keys in one step. The server's clock is the only one used.

The scripts make a job's name from its number; it is in the same slot as the declared keys. Each script may run twice,
since its answer can be lost on the way: the second run changes nothing and returns the same. What the caller is then
told is so it writes again as it is, for else nobody waits until that lasts (`RedisConnection.write`).
"""

from __future__ import annotations

ALLOW_OOM = "#!lua flags=allow-oom"
"""Begins a script that a server runs even at its `maxmemory`: what lets users go, and what decides which keys count."""

NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

ERASED_SINCE = """
local function erased_since(key, seen)
  local epoch = redis.call('HGET', key, 'epoch')
  return epoch and epoch ~= seen
end
"""
"""Whether a user was erased since their epoch was seen; this is forgotten once the tombstone expires."""

_END = """
local function ended(job, state, ttl)
  redis.call('HSET', job, 'state', state, 'ended_ms', now)
  redis.call('HDEL', job, 'lease', 'lease_until', 'lease_ms')
  redis.call('EXPIRE', job, ttl)
end
local function open(job)
  local state = redis.call('HGET', job, 'state')
  return state == 'queued' or state == 'running'
end
"""

# KEYS: jobs, samples, epoch. ARGV: prefix of job names, idempotency key, token, the epoch seen, deadline (ms), bank,
# config, whether to append, most samples, jobs kept, how long an ended one is kept (s), traceparent, the number before
# a user's first job, then samples. Returns the job's number, 0 if there would be too many samples, -1 if the user was
# erased, -2 if the deadline has passed.
SUBMIT = (
    NOW
    + ERASED_SINCE
    + _END
    + """
local prefix, key, token = ARGV[1], ARGV[2], ARGV[3]
if erased_since(KEYS[3], ARGV[4]) then return -1 end
local last = tonumber(redis.call('HGET', KEYS[1], 'last') or ARGV[13])
local function again(number)
  redis.call('HSET', KEYS[1], 'last', last)
  return number
end
local oldest = math.max(1, last - ARGV[10] + 1)
if key ~= '' then
  for number = last, oldest, -1 do
    if redis.call('HGET', prefix .. number, 'key') == key then return again(number) end
  end
else
  local state = redis.call('HGET', prefix .. last, 'state')
  local well = state == 'queued' or state == 'running' or state == 'succeeded'
  if well and redis.call('HGET', prefix .. last, 'token') == token then return again(last) end
end
if now > tonumber(ARGV[5]) then return -2 end
local known, kept, fresh = {}, 0, {}
local appended = ARGV[8] == '1'
for _, sample in ipairs(appended and redis.call('LRANGE', KEYS[2], 0, -1) or {}) do
  known[sample], kept = true, kept + 1
end
for i = 14, #ARGV do
  if not known[ARGV[i]] then known[ARGV[i]], fresh[#fresh + 1] = true, ARGV[i] end
end
if kept + #fresh > tonumber(ARGV[9]) then return 0 end
if not appended then redis.call('DEL', KEYS[2]) end
for _, sample in ipairs(fresh) do redis.call('RPUSH', KEYS[2], sample) end
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do  -- version 0.1 kept idempotency keys there
  if field ~= 'last' then redis.call('HDEL', KEYS[1], field) end
end
local number = last + 1
redis.call('HSET', KEYS[1], 'last', number)
redis.call('DEL', prefix .. (number - ARGV[10]))
for older = math.max(1, number - ARGV[10] + 1), last do
  if open(prefix .. older) then ended(prefix .. older, 'superseded', ARGV[11]) end
end
redis.call('HSET', prefix .. number, 'state', 'queued', 'config', ARGV[7], 'created_ms', now, 'bank', ARGV[6],
  'epoch', ARGV[4], 'token', token)
if key ~= '' then redis.call('HSET', prefix .. number, 'key', key) end
if ARGV[12] ~= '' then redis.call('HSET', prefix .. number, 'traceparent', ARGV[12]) end
return number
"""
)

# KEYS: job. ARGV: token, how long it is kept (s). Returns 1 if this call ended it.
CANCEL = (
    NOW
    + _END
    + """
local state = redis.call('HGET', KEYS[1], 'state')
local mine = redis.call('HGET', KEYS[1], 'ended_by') == ARGV[1]
if not open(KEYS[1]) then
  if state then redis.call('HSET', KEYS[1], 'state', state) end
  return mine and 1 or 0
end
redis.call('HSET', KEYS[1], 'ended_by', ARGV[1])
ended(KEYS[1], 'cancelled', ARGV[2])
return 1
"""
)

# KEYS: job. ARGV: token, lease (ms), most tries, error after the last, how long it is kept (s). Returns 1 if the
# caller has it now, 0 if another has it, -1 if there is nothing left to do. A lease with more time left than its whole
# length was given before the clock was set back, and counts as lost.
CLAIM = (
    NOW
    + _END
    + """
if not open(KEYS[1]) then return -1 end
if redis.call('HGET', KEYS[1], 'lease') == ARGV[1] then return 1 end
local left = tonumber(redis.call('HGET', KEYS[1], 'lease_until') or 0) - now
if left > 0 and left <= tonumber(redis.call('HGET', KEYS[1], 'lease_ms') or left) then return 0 end
if redis.call('HINCRBY', KEYS[1], 'tries', 1) > tonumber(ARGV[3]) then
  redis.call('HSET', KEYS[1], 'error', ARGV[4], 'tries', ARGV[3])
  ended(KEYS[1], 'failed', ARGV[5])
  return -1
end
redis.call('HSET', KEYS[1], 'state', 'running', 'lease', ARGV[1], 'lease_until', now + ARGV[2], 'lease_ms', ARGV[2])
redis.call('HSETNX', KEYS[1], 'started_ms', now)
return 1
"""
)

# KEYS: job. ARGV: token, lease (ms), step, of, loss, curve (empty if it is as it was). Returns whether the lease holds.
RENEW = (
    NOW
    + """
if redis.call('HGET', KEYS[1], 'lease') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'lease_until', now + ARGV[2], 'lease_ms', ARGV[2], 'step', ARGV[3], 'of', ARGV[4],
  'loss', ARGV[5])
if ARGV[6] ~= '' then redis.call('HSET', KEYS[1], 'curve', ARGV[6]) end
return 1
"""
)

# KEYS: job. ARGV: token, what to add to its tries. Returns whether it is queued again.
RELEASE = """
if redis.call('HGET', KEYS[1], 'lease') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'state', 'queued')
redis.call('HINCRBY', KEYS[1], 'tries', ARGV[2])
redis.call('HDEL', KEYS[1], 'lease', 'lease_until', 'lease_ms', 'started_ms', 'step', 'of', 'loss', 'curve')
return 1
"""

_MINE = """
if redis.call('HGET', KEYS[1], 'ended_by') == ARGV[1] then
  redis.call('HSET', KEYS[1], 'ended_by', ARGV[1])
  return 1
end
if redis.call('HGET', KEYS[1], 'lease') ~= ARGV[1] then return 0 end
"""

_OUTCOME = """
redis.call('HSET', KEYS[1], 'ended_by', ARGV[1], 'before', ARGV[3], 'after', ARGV[4], 'error', ARGV[5],
  'adapter', ARGV[6])
ended(KEYS[1], ARGV[2], ARGV[7])
"""

# KEYS: job. ARGV: token, state, before, after, error, adapter, how long it is kept (s). Returns whether it was written.
END = (
    NOW
    + _END
    + _MINE
    + _OUTCOME
    + """
return 1
"""
)

# KEYS: job, record, adapter, epoch. ARGV: as END, then the record expected, the new one, the adapter's bank, recipe,
# checksum and bytes. Returns whether all of it was written.
PROMOTE = (
    NOW
    + ERASED_SINCE
    + _END
    + _MINE
    + """
if erased_since(KEYS[4], redis.call('HGET', KEYS[1], 'epoch') or '') then return 0 end
local bank = redis.call('HGET', KEYS[1], 'bank')
if bank and bank ~= ARGV[10] then return 0 end
if redis.call('GET', KEYS[2]) ~= ARGV[8] then return 0 end
redis.call('SET', KEYS[2], ARGV[9])
redis.call('DEL', KEYS[3])
redis.call('HSET', KEYS[3], 'id', ARGV[6], 'recipe', ARGV[11], 'sha256', ARGV[12], 'raw', ARGV[13])
"""
    + _OUTCOME
    + """
return 1
"""
)
