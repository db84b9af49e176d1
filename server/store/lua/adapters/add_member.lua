-- KEYS: a set. ARGV: the member. Always writes, because the store does not wait for a script that changes nothing.
redis.call('SREM', KEYS[1], ARGV[1])
return redis.call('SADD', KEYS[1], ARGV[1])
