-- uses: prelude, jobs/lease
-- ARGV: new key, expiry of its name (s), time for `_ARRIVE` (ms), prefix of job names, number of kept jobs. Returns
-- `busy` while a worker holds the user's job, `moved` if nothing is left to move; else `left`, the bank of an open job,
-- and what `_ARRIVE` needs to know.
local target, stays_s, within, prefix, kept = unpack(ARGV)
local left = KEYS[#KEYS]
local epoch, moved, until_ms = unpack(redis.call('HMGET', left, 'epoch', 'moved', 'until_ms'))
if moved then return {'moved'} end
local last = tonumber(redis.call('HGET', KEYS[1], 'last') or 0)
if string.sub(epoch or '', 1, 1) ~= '>' then
  if lease_left(prefix .. last) > 0 then return {'busy'} end
  local ttl = redis.call('PTTL', left)
  until_ms = ttl > 0 and now + ttl or 0
  redis.call('HSET', left, 'epoch', '>' .. target .. ' ' .. (epoch or ''), 'until_ms', until_ms)
end
redis.call('EXPIRE', left, stays_s)
local bank = is_open(prefix .. last) and redis.call('HGET', prefix .. last, 'bank') or ''
local tombstone = cjson.encode(redis.call('HGETALL', left))
local found = {'left', bank, now + within, tombstone, math.max(0, until_ms - now)}
local function take(place, key)
  local raw, ttl, n = redis.call('DUMP', key), math.max(0, redis.call('PTTL', key)), #found
  if raw then found[n + 1], found[n + 2], found[n + 3] = place, ttl, raw end
end
for place = 1, #KEYS - 1 do take('k' .. place, KEYS[place]) end
for number = math.max(1, last - kept), last do take('j' .. number, prefix .. number) end
return found
