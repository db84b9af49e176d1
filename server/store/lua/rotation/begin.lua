-- KEYS: the record of the secret. ARGV: check values of the new one and the old one. Returns whether it is news, or -1
-- while users still move from the new one to the old one.
local of_new, of_old = unpack(ARGV)
if redis.call('HGET', KEYS[1], 'from') == of_new then return -1 end
local news = redis.call('HGET', KEYS[1], 'in') ~= of_new
redis.call('HSET', KEYS[1], 'in', of_new, 'from', of_old)
return news and 1 or 0
