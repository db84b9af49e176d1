"""The Lua scripts of jobs: each changes one user's keys in one step. The server's clock is the only one.

A job's name is made from its number inside the scripts; it lies in the slot of the keys that are declared.
"""

from __future__ import annotations

NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

_END = """
local function ended(job, state, ttl)
  redis.call('HSET', job, 'state', state, 'ended_ms', now)
  redis.call('HDEL', job, 'lease', 'lease_until')
  redis.call('EXPIRE', job, ttl)
end
local function open(job)
  local state = redis.call('HGET', job, 'state')
  return state == 'queued' or state == 'running'
end
"""

# KEYS: jobs, samples. ARGV: prefix of job names, idempotency key, config, whether to append, most samples, jobs kept,
# how long an ended one is kept (s), then samples. Answers the job's number, or 0 when there would be too many samples.
SUBMIT = (
    NOW
    + _END
    + """
local prefix, key = ARGV[1], ARGV[2]
if key ~= '' then
  local number = redis.call('HGET', KEYS[1], 'key:' .. key)
  if number and redis.call('EXISTS', prefix .. number) == 1 then return tonumber(number) end
end
local appended = ARGV[4] == '1'
local kept = appended and redis.call('LLEN', KEYS[2]) or 0
if kept + #ARGV - 7 > tonumber(ARGV[5]) then return 0 end
if not appended then redis.call('DEL', KEYS[2]) end
for i = 8, #ARGV do redis.call('RPUSH', KEYS[2], ARGV[i]) end
local number = redis.call('HINCRBY', KEYS[1], 'last', 1)
local oldest = number - tonumber(ARGV[6])
local forgotten = redis.call('HGET', prefix .. oldest, 'key')
if forgotten then redis.call('HDEL', KEYS[1], 'key:' .. forgotten) end
redis.call('DEL', prefix .. oldest)
for older = math.max(1, oldest + 1), number - 1 do
  if open(prefix .. older) then ended(prefix .. older, 'superseded', ARGV[7]) end
end
redis.call('HSET', prefix .. number, 'state', 'queued', 'config', ARGV[3], 'created_ms', now)
if key ~= '' then
  redis.call('HSET', prefix .. number, 'key', key)
  redis.call('HSET', KEYS[1], 'key:' .. key, number)
end
return number
"""
)

# KEYS: job. ARGV: how long it is kept (s). Answers 1 when this ended it.
CANCEL = (
    NOW
    + _END
    + """
if not open(KEYS[1]) then return 0 end
ended(KEYS[1], 'cancelled', ARGV[1])
return 1
"""
)

# KEYS: job. ARGV: token, lease (ms), most tries, error after the last, how long it is kept (s). Answers 1 when it is
# the caller's now, 0 when another has it, -1 when there is nothing to do any more.
CLAIM = (
    NOW
    + _END
    + """
if not open(KEYS[1]) then return -1 end
if redis.call('HGET', KEYS[1], 'lease') == ARGV[1] then return 1 end  -- the answer was lost on its way
local until_ms = tonumber(redis.call('HGET', KEYS[1], 'lease_until') or 0)
if until_ms > now then return 0 end
if redis.call('HINCRBY', KEYS[1], 'tries', 1) > tonumber(ARGV[3]) then
  redis.call('HSET', KEYS[1], 'error', ARGV[4], 'tries', ARGV[3])
  ended(KEYS[1], 'failed', ARGV[5])
  return -1
end
redis.call('HSET', KEYS[1], 'state', 'running', 'lease', ARGV[1], 'lease_until', now + ARGV[2])
redis.call('HSETNX', KEYS[1], 'started_ms', now)
return 1
"""
)

# KEYS: job. ARGV: token, lease (ms), step, of, loss. Answers whether the lease holds.
RENEW = (
    NOW
    + """
if redis.call('HGET', KEYS[1], 'lease') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'lease_until', now + ARGV[2], 'step', ARGV[3], 'of', ARGV[4], 'loss', ARGV[5])
return 1
"""
)

# KEYS: job. ARGV: token, what to add to its tries. Answers whether it is queued again.
RELEASE = """
if redis.call('HGET', KEYS[1], 'lease') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'state', 'queued')
redis.call('HINCRBY', KEYS[1], 'tries', ARGV[2])
redis.call('HDEL', KEYS[1], 'lease', 'lease_until', 'started_ms', 'step', 'of', 'loss')
return 1
"""

_OUTCOME = """
redis.call('HSET', KEYS[1], 'before', ARGV[3], 'after', ARGV[4], 'error', ARGV[5], 'adapter', ARGV[6])
ended(KEYS[1], ARGV[2], ARGV[7])
"""

# KEYS: job. ARGV: token, state, before, after, error, adapter, how long it is kept (s). Answers whether it was written.
END = (
    NOW
    + _END
    + """
if redis.call('HGET', KEYS[1], 'lease') ~= ARGV[1] then return 0 end
"""
    + _OUTCOME
    + """
return 1
"""
)

# KEYS: job, record, adapter. ARGV: as END, then the record expected, the new one, and the adapter's recipe, checksum
# and bytes. Answers whether all of it was written.
PROMOTE = (
    NOW
    + _END
    + """
if redis.call('HGET', KEYS[1], 'lease') ~= ARGV[1] then return 0 end
if redis.call('GET', KEYS[2]) ~= ARGV[8] then return 0 end
redis.call('SET', KEYS[2], ARGV[9])
redis.call('DEL', KEYS[3])
redis.call('HSET', KEYS[3], 'id', ARGV[6], 'recipe', ARGV[10], 'sha256', ARGV[11], 'raw', ARGV[12])
"""
    + _OUTCOME
    + """
return 1
"""
)
