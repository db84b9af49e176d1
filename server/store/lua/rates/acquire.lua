-- uses: prelude
-- KEYS: holders, scored by the end of their lease. ARGV: most (-1: unlimited), lease (ms), members. Returns the number
-- of holders, or -1 if not all members fit.
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local most, lease = tonumber(ARGV[1]), tonumber(ARGV[2])
for i = 3, #ARGV do
  local known = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if not known and most >= 0 and redis.call('ZCARD', KEYS[1]) >= most then return -1 end
  redis.call('ZADD', KEYS[1], now + lease, ARGV[i])
end
redis.call('PEXPIRE', KEYS[1], lease)
return redis.call('ZCARD', KEYS[1])
