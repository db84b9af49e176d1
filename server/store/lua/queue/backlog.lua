-- uses: prelude, queue/turns
local all, due, first = 0, 0, now
for class = 1, 2 do
  all = all + redis.call('ZCARD', KEYS[class])
  due = due + redis.call('ZCOUNT', KEYS[class], '-inf', now)
  local waiting = redis.call('ZRANGEBYSCORE', KEYS[class], '-inf', '(0', 'WITHSCORES', 'LIMIT', 0, 1)[2]
  local again = redis.call('ZRANGEBYSCORE', KEYS[class], 0, now, 'WITHSCORES', 'LIMIT', 0, 1)[2]
  first = math.min(first, waiting and waiting % turn_length * 1000 or now, again or now)
end
return {all, due, now - first}
