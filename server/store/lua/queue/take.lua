-- uses: prelude, queue/turns
-- Whoever was taken before and is due again comes first. An entry further in the future than any entry this clock
-- creates was added before the clock was set back.
local grace, furthest = unpack(ARGV)
for class = 1, 2 do
  local found = redis.call('ZRANGEBYSCORE', KEYS[class], 0, now, 'LIMIT', 0, 1)[1]
    or redis.call('ZRANGEBYSCORE', KEYS[class], now + furthest, '+inf', 'LIMIT', 0, 1)[1]
  if not found then
    local score
    found, score = unpack(redis.call('ZRANGEBYSCORE', KEYS[class], '-inf', '(0', 'WITHSCORES', 'LIMIT', 0, 1))
    if found then redis.call('HSET', KEYS[4], class, math.floor(score / turn_length) + turns) end
  end
  if found then
    local user = string.match(found, '^[^+]+')
    for each = 1, 2 do redis.call('ZREM', KEYS[each], found, user) end
    redis.call('ZADD', KEYS[class], now + grace, user)
    return {user, now + grace}
  end
end
return {}
