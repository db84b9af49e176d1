-- uses: prelude
-- KEYS: job. An empty curve keeps the stored one. Returns whether the lease is still valid.
local token, lease_ms, step, of, curve = unpack(ARGV)
if redis.call('HGET', KEYS[1], 'lease') ~= token then return 0 end
redis.call('HSET', KEYS[1], 'lease_until', now + lease_ms, 'lease_ms', lease_ms, 'step', step, 'of', of)
if curve ~= '' then redis.call('HSET', KEYS[1], 'curve', curve) end
return 1
