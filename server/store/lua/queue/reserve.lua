-- uses: prelude
local set, entry, ahead = KEYS[tonumber(ARGV[1])], ARGV[2], ARGV[3]
redis.call('ZADD', set, now + ahead, entry)
return now
