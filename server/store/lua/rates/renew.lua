-- uses: prelude
-- KEYS: holders. ARGV: lease (ms), members. Members that are not holders are not added.
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], 'XX', now + ARGV[1], ARGV[i]) end
return redis.call('PEXPIRE', KEYS[1], ARGV[1])
