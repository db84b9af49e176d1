"""Helpers for Lua scripts, and the scripts for jobs. Each script changes one user's keys atomically.

Times come from the server's clock alone. A script may run twice, because its answer can be lost. The second run changes
nothing and returns the same answer, but it repeats the write, because Redis waits for durability only after a write.
"""

_PRELUDE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function has_left(key)  -- for the key of another secret (`rotation.py`)
  return string.sub(redis.call('HGET', key, 'epoch') or '', 1, 1) == '>'
end
local function is_as_seen(key, seen)  -- as `ProfileStore.begin` returned it; without a mark while no tombstone says no
  local epoch, mark = unpack(redis.call('HMGET', key, 'epoch', 'mark'))
  local seen_epoch, seen_mark = string.match(seen, '^([^+]*)%+?(.*)$')
  return (not epoch or epoch == seen_epoch) and (seen_mark == '' or mark == seen_mark)
end
local function erased_since(key, seen) return has_left(key) or not is_as_seen(key, seen) end
"""


def script(body: str) -> str:
    """Return a script with `now` (ms) and `erased_since(key, epoch)` defined.

    A user is erased since a write began if there is a tombstone with another epoch, or the mark that it left is gone.
    """
    return _PRELUDE + body


def oom_script(body: str) -> str:
    """Return a script that also runs at `maxmemory`: for erasures, worker progress, limits and API keys."""
    return "#!lua flags=allow-oom" + script(body)


def job_script(body: str) -> str:
    """Return a script like `script` that knows whether a job is open, and its lease, and can change who serves."""
    return script(_JOB + _ADAPTER + body)


# A lease with more time left than its full length was granted before the clock was set back; it counts as expired.
_JOB = """
local function is_open(job)
  local state = redis.call('HGET', job, 'state')
  return state == 'queued' or state == 'running'
end
local function lease_left(job)
  local ends, length = unpack(redis.call('HMGET', job, 'lease_until', 'lease_ms'))
  local left = tonumber(ends or 0) - now
  return left > 0 and left <= tonumber(length or left) and left or 0
end
local function finish(job, state, leaves_samples)
  redis.call('HSET', job, 'state', state, 'ended_ms', now)
  redis.call('HDEL', job, 'lease', 'lease_until', 'lease_ms')
  if redis.call('HGET', job, 'forgets') == '1' and not leaves_samples then
    redis.call('DEL', (string.gsub(job, 'job:%d+$', 'samples')))
  end
end
"""

# `given` is `KeptVersions.change`, `raw` the bytes of a new version.
_ADAPTER = """
local function serve(key, given, raw)
  local to = cjson.decode(given.to)
  if given.left ~= '' then
    local number = cjson.decode(given.left).number
    redis.call('HSET', key, 'raw:' .. number, redis.call('HGET', key, 'raw'), 'facts:' .. number, given.left)
  end
  for _, number in ipairs(given.dropped) do redis.call('HDEL', key, 'raw:' .. number, 'facts:' .. number) end
  redis.call('HSET', key, 'id', to.note.id, 'recipe', to.note.recipe, 'sha256', to.sha256,
    'raw', raw or redis.call('HGET', key, 'raw:' .. to.number), 'facts:' .. to.number, given.to)
  redis.call('HDEL', key, 'raw:' .. to.number, 'chosen_ms')
end
"""

# KEYS: jobs, samples, epoch, adapter. ARGV: JSON (`JobStore.submit`), then the samples. Returns the job's number and
# whether this call made it; instead of a number 0 for too many samples or an open job that is not to be replaced, -1 if
# the user was erased, -2 if the deadline has passed.
SUBMIT = job_script("""
local given = cjson.decode(ARGV[1])
if erased_since(KEYS[3], given.epoch) then return {-1, 0} end

local last = tonumber(redis.call('HGET', KEYS[1], 'last') or given.number_before)
local oldest = math.max(1, last - given.kept + 1)
local function name(number) return given.prefix .. number end
local function known(number)
  redis.call('HSET', KEYS[1], 'last', last)
  return {number, redis.call('HGET', name(number), 'made_by') == given.call and 1 or 0}
end
if given.idempotency_key ~= '' then
  for number = last, oldest, -1 do
    if redis.call('HGET', name(number), 'key') == given.idempotency_key then return known(number) end
  end
else
  local token, bank, made = unpack(redis.call('HMGET', name(last), 'token', 'bank', 'adapter'))
  local open = is_open(name(last))
  -- a background job is alike each time, for what it learns from is in the store
  local serves = not given.background and (made or '') ~= '' and made == redis.call('HGET', KEYS[4], 'id')
  if (open or serves) and token == given.token then return known(last) end
  if open and given.background and bank == given.bank then return {0, 0} end
end
if now > given.until_ms then return {-2, 0} end
redis.call('EXISTS', name(last + 1))  -- a server whose slot moves refuses new keys: here, before anything is written

local seen, kept, fresh = {}, 0, {}
for _, sample in ipairs(given.append and redis.call('LRANGE', KEYS[2], 0, -1) or {}) do
  seen[sample], kept = true, kept + 1
end
for i = 2, #ARGV do
  if not seen[ARGV[i]] then seen[ARGV[i]], fresh[#fresh + 1] = true, ARGV[i] end
end
if kept + #fresh > given.max_samples then return {0, 0} end
if not given.append then redis.call('DEL', KEYS[2]) end
for _, sample in ipairs(fresh) do redis.call('RPUSH', KEYS[2], sample) end
if given.forgets_s > 0 then redis.call('EXPIRE', KEYS[2], given.forgets_s) end

local number = last + 1
redis.call('HSET', KEYS[1], 'last', number)
redis.call('DEL', name(number - given.kept))
for older = math.max(1, number - given.kept + 1), last do
  if is_open(name(older)) then finish(name(older), 'superseded', true) end
end
redis.call('HSET', name(number), 'state', 'queued', 'config', given.config, 'created_ms', now, 'bank', given.bank,
  'epoch', redis.call('HGET', KEYS[3], 'epoch') or '', 'token', given.token, 'key', given.idempotency_key,
  'traceparent', given.traceparent, 'made_by', given.call, 'background', given.background and 1 or 0,
  'forgets', given.forgets_s > 0 and 1 or 0)
return {number, 1}
""")

# KEYS: jobs. ARGV: prefix of job names, number of kept jobs, fields. Returns number and fields of each job.
JOBS = """
local last, found = tonumber(redis.call('HGET', KEYS[1], 'last') or 0), {}
for number = math.max(1, last - ARGV[2] + 1), last do
  found[#found + 1] = {number, redis.call('HMGET', ARGV[1] .. number, unpack(ARGV, 3))}
end
return found
"""

# KEYS: job. Returns state, bank and remaining lease time (ms).
OPEN_JOB = job_script("""
local state, bank = unpack(redis.call('HMGET', KEYS[1], 'state', 'bank'))
return {state, bank, lease_left(KEYS[1])}
""")

# KEYS: job, epoch. Returns whether this call ended it, -1 if the user left this key.
CANCEL = job_script("""
local token = ARGV[1]
if has_left(KEYS[2]) then return -1 end
local state, ended_by = unpack(redis.call('HMGET', KEYS[1], 'state', 'ended_by'))
if not is_open(KEYS[1]) then
  if state then redis.call('HSET', KEYS[1], 'state', state) end
  return ended_by == token and 1 or 0
end
redis.call('HSET', KEYS[1], 'ended_by', token)
finish(KEYS[1], 'cancelled')
return 1
""")

# KEYS: job. Returns whether the caller holds the lease now.
CLAIM = job_script("""
local token, lease_ms, max_tries, error = unpack(ARGV)
if not is_open(KEYS[1]) then return 0 end
if redis.call('HGET', KEYS[1], 'lease') == token then return 1 end
if lease_left(KEYS[1]) > 0 then return 0 end
if redis.call('HINCRBY', KEYS[1], 'tries', 1) > tonumber(max_tries) then
  redis.call('HSET', KEYS[1], 'error', error, 'tries', max_tries)
  finish(KEYS[1], 'failed')
  return 0
end
redis.call('HSET', KEYS[1], 'state', 'running', 'lease', token, 'lease_until', now + lease_ms, 'lease_ms', lease_ms,
  'started_ms', now)
return 1
""")

# KEYS: job. An empty curve keeps the stored one. Returns whether the lease is still valid.
RENEW = script("""
local token, lease_ms, step, of, curve = unpack(ARGV)
if redis.call('HGET', KEYS[1], 'lease') ~= token then return 0 end
redis.call('HSET', KEYS[1], 'lease_until', now + lease_ms, 'lease_ms', lease_ms, 'step', step, 'of', of)
if curve ~= '' then redis.call('HSET', KEYS[1], 'curve', curve) end
return 1
""")

# KEYS: job. Returns whether it is queued again.
RELEASE = """
local token, more_tries = unpack(ARGV)
if redis.call('HGET', KEYS[1], 'lease') ~= token then return 0 end
redis.call('HSET', KEYS[1], 'state', 'queued')
redis.call('HINCRBY', KEYS[1], 'tries', more_tries)
redis.call('HDEL', KEYS[1], 'lease', 'lease_until', 'lease_ms', 'started_ms', 'step', 'of', 'curve')
return 1
"""

# KEYS: job; to promote an adapter also record, adapter, epoch. ARGV: JSON (`_outcome` in `jobs.py`); to promote also
# what `serve` needs in it, the expected record, the new one, the adapter's bytes. Returns whether all was written.
END = job_script("""
local given = cjson.decode(ARGV[1])
if redis.call('HGET', KEYS[1], 'ended_by') == given.token then
  redis.call('HSET', KEYS[1], 'ended_by', given.token)
  return 1
end
if redis.call('HGET', KEYS[1], 'lease') ~= given.token then return 0 end
if #KEYS > 1 then
  local expected, record, raw = unpack(ARGV, 2)
  if has_left(KEYS[4]) or redis.call('HGET', KEYS[1], 'bank') ~= given.bank then return 0 end
  if redis.call('GET', KEYS[2]) ~= expected then return 0 end
  serve(KEYS[3], given, raw)
  redis.call('SET', KEYS[2], record)
end
redis.call('HSET', KEYS[1], 'ended_by', given.token, 'before', given.before, 'after', given.after,
  'served', given.served, 'error', given.error, 'adapter', given.adapter)
finish(KEYS[1], given.state)
return 1
""")

# KEYS: record, adapter, epoch, jobs. ARGV: JSON for `serve`, the expected record, the new one, prefix of job names. An
# open job that no client asked for ends. Returns 1 if all was written, 0 if the record changed, -1 if the user left.
SERVE = job_script("""
local given, expected, record, prefix = cjson.decode(ARGV[1]), unpack(ARGV, 2)
if has_left(KEYS[3]) then return -1 end
local current = redis.call('GET', KEYS[1])
if current ~= expected and current ~= record then return 0 end
if current == expected and given.left ~= given.to then
  serve(KEYS[2], given)
  redis.call('HSET', KEYS[2], 'chosen_ms', now)
  local newest = prefix .. (redis.call('HGET', KEYS[4], 'last') or '')
  if is_open(newest) and redis.call('HGET', newest, 'background') == '1' then finish(newest, 'superseded') end
end
redis.call('SET', KEYS[1], record)
return 1
""")
