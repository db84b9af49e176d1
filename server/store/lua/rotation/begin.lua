-- KEYS: the record of the secret. ARGV: check values of the new one and the old one. Returns 0 while users still move from
-- the new one to the old one, else 1.
local of_new, of_old = unpack(ARGV)
if redis.call('HGET', KEYS[1], 'from') == of_new then return 0 end
redis.call('HSET', KEYS[1], 'in', of_new, 'from', of_old)
return 1
