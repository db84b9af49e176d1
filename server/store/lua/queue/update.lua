-- uses: prelude
-- Postpone an entry by the given ms, or remove it if none are given, provided that it has the score the caller saw.
-- Returns its new score, or 0 if there is no entry. In an empty queue the turns begin anew.
local user, seen, wait = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
if not wait then redis.call('HDEL', KEYS[3], user) end
for class = 1, 2 do
  local score = tonumber(redis.call('ZSCORE', KEYS[class], user) or 0)
  if score ~= 0 and score ~= seen then return score end
  if score ~= 0 and wait then
    redis.call('ZADD', KEYS[class], now + wait, user)
    return now + wait
  end
  redis.call('ZREM', KEYS[class], user)
end
if redis.call('EXISTS', KEYS[1], KEYS[2]) == 0 then redis.call('DEL', KEYS[4]) end
return 0
