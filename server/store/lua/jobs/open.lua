-- uses: jobs/lease
-- KEYS: job. Returns state, bank and remaining lease time (ms).
local state, bank = unpack(redis.call('HMGET', KEYS[1], 'state', 'bank'))
return {state, bank, lease_left(KEYS[1])}
