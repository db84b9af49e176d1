-- uses: prelude
-- ARGV: epoch of this key before step 1 (`leave_mark`), prefix of job names, deadline (ms), fields of the old key's
-- epoch (JSON) and their expiry (ms; 0: none), and of each key its place in KEYS or the number of its job, its expiry
-- and its content. Returns whether the user is here now.
local before, prefix, until_ms, tombstone, expiry = unpack(ARGV)
local here, data = KEYS[#KEYS], {unpack(KEYS, 1, #KEYS - 1)}
if now > tonumber(until_ms) or not is_as_seen(here, before) then return 0 end
if string.sub(before, 1, 1) == '>' then
  redis.call('DEL', unpack(data))  -- what stayed here of a user who moved away and comes back
elseif redis.call('EXISTS', unpack(data)) > 0 then  -- of an earlier call
  local record = redis.call('GET', KEYS[2])
  if record then redis.call('SET', KEYS[2], record) end
  return 1
end
for i = 6, #ARGV, 3 do
  local kind, number = string.match(ARGV[i], '^(%a)(%d+)$')
  local key = kind == 'j' and prefix .. number or KEYS[tonumber(number)]
  redis.call('RESTORE', key, ARGV[i + 1], ARGV[i + 2], 'REPLACE')
end
redis.call('DEL', here)
if tonumber(expiry) > 0 then
  redis.call('HSET', here, unpack(cjson.decode(tombstone)))
  redis.call('HSET', here, 'epoch', string.match(redis.call('HGET', here, 'epoch'), ' (.*)$'))
  redis.call('HDEL', here, 'until_ms')
  redis.call('PEXPIRE', here, expiry)
end
return 1
