-- uses: prelude
-- KEYS: rewrite. ARGV: the server's run id, its number of rewrites, whether the last one succeeded, interval, time to
-- erase, time after which a rewrite is tried again. Returns whether to start one now, and whether the one before
-- failed.
local run, rewrites, succeeded, interval_ms, erase_ms, retry_ms = unpack(ARGV)
local function get(field) return redis.call('HGET', KEYS[1], field) end
local function is_recent(time, ms) return time and tonumber(time) <= now and now - time < tonumber(ms) end
local tried, before = get('tried'), get('before') or ''
local number = string.match(before, '^' .. run .. ' (%d+)$')
if number and tonumber(rewrites) > tonumber(number) and succeeded == '1' and tonumber(tried) <= now then
  redis.call('HSET', KEYS[1], 'last', tried)
  redis.call('HDEL', KEYS[1], 'first', 'due', 'tried', 'before')
  if (get('asked') or 0) + erase_ms > tonumber(tried) then redis.call('HSET', KEYS[1], 'first', tried) end
end
local holds_erased = get('first') or get('due')
if not holds_erased or is_recent(get('last'), interval_ms) or is_recent(get('tried'), retry_ms) then return {0, 0} end
local has_failed = redis.call('HEXISTS', KEYS[1], 'tried')
redis.call('HSET', KEYS[1], 'tried', now, 'before', run .. ' ' .. rewrites)
return {1, has_failed}
