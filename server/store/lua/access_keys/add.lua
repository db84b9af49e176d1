-- uses: access_keys/changed
local digest, record, only_first = unpack(ARGV, 3)
local before = redis.call('HGET', KEYS[1], digest)
if not before and only_first == '1' and redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], digest, before or record)
if not before then changed(digest) end
return 1
