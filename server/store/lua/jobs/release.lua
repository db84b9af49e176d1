-- KEYS: job. Returns whether it is queued again.
local token, more_tries = unpack(ARGV)
if redis.call('HGET', KEYS[1], 'lease') ~= token then return 0 end
redis.call('HSET', KEYS[1], 'state', 'queued')
redis.call('HINCRBY', KEYS[1], 'tries', more_tries)
redis.call('HDEL', KEYS[1], 'lease', 'lease_until', 'lease_ms', 'started_ms', 'step', 'of', 'curve')
return 1
