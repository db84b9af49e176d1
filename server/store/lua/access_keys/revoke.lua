-- uses: access_keys/changed
local digest, now = unpack(ARGV, 3)
if redis.call('HEXISTS', KEYS[1], digest) == 0 then return 0 end
local before = redis.call('HGET', KEYS[1], 'revoked:' .. digest)
redis.call('HSET', KEYS[1], 'revoked:' .. digest, before or now)
if before then return 0 end
changed('revoked:' .. digest)
return 1
