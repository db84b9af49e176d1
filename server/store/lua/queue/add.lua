-- uses: prelude, queue/turns
-- A waiting user keeps their position but gets a new score, so a worker that remembers the old one removes nothing.
local class, user, listed, tenant = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
local score = tonumber(redis.call('ZSCORE', KEYS[class], user) or now + 1)
if score <= now then
  score = score + 1
else
  local own = class .. ':' .. tenant
  local mine = math.min(math.max(turn(class), turn(own)), turns - 1)
  redis.call('HSET', KEYS[4], own, mine + 1)
  score = (mine - turns) * turn_length + time[1]
end
redis.call('ZADD', KEYS[class], score, user)
redis.call('ZREM', KEYS[3 - class], user)
redis.call('ZREM', KEYS[class], listed)
return 1
