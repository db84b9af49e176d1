-- uses: prelude
-- KEYS: rewrite, of each server. ARGV: time until the announcement counts (ms). Returns the current time.
for _, key in ipairs(KEYS) do
  redis.call('HSETNX', key, 'first', now)
  redis.call('HSET', key, 'asked', math.max(now + ARGV[1], tonumber(redis.call('HGET', key, 'asked') or 0)))
end
return now
