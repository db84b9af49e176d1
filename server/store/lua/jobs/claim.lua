-- uses: prelude, jobs/lease
-- KEYS: job. Returns whether the caller holds the lease now.
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
