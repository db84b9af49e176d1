-- ARGV: time for requests in progress (ms), prefix of job names, number of kept jobs.
local grace, prefix, kept = unpack(ARGV)
local left = KEYS[#KEYS]
local epoch, ttl = redis.call('HGET', left, 'epoch'), redis.call('PTTL', left)
if epoch then
  redis.call('DEL', left)
  redis.call('HSET', left, 'epoch', epoch, 'moved', 1)
  redis.call('PEXPIRE', left, ttl)
end
local last = tonumber(redis.call('HGET', KEYS[1], 'last') or 0)
for number = math.max(1, last - kept), last do redis.call('DEL', prefix .. number) end
redis.call('PEXPIRE', KEYS[3], grace)
redis.call('PEXPIRE', KEYS[#KEYS - 1], grace)
for place = 1, #KEYS - 1 do
  if place ~= 3 and place ~= #KEYS - 1 then redis.call('DEL', KEYS[place]) end
end
return 1
