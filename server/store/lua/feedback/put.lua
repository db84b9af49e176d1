-- uses: prelude
-- KEYS: feedback, learned, epoch, record. ARGV: epoch, answer, the entry that was seen (empty: none), JSON of the new
-- one, sample (empty: none), number of kept entries, expiry of those of a person without a profile (s). An entry is
-- `<ms> <JSON>`: the time of the newest text sent instead of the answer, or of the first feedback. Returns 1 if
-- written, 0 if the entry is another than that seen, -1 if the user was erased.
local epoch, answer, seen, entry, sample, kept, stays_s = unpack(ARGV)
if erased_since(KEYS[3], epoch) then return -1 end
local before = redis.call('HGET', KEYS[1], answer) or ''
if before ~= seen then return 0 end
local is_new = before == '' or sample ~= '' and redis.call('HGET', KEYS[2], answer) ~= sample
local at = is_new and string.format('%d', now) or string.match(before, '^%d+')
redis.call('HSET', KEYS[1], answer, at .. ' ' .. entry)
if sample ~= '' then redis.call('HSET', KEYS[2], answer, sample) end
if redis.call('EXISTS', KEYS[4]) == 0 then redis.call('EXPIRE', KEYS[1], stays_s) end
for _ = 1, redis.call('HLEN', KEYS[1]) - tonumber(kept) do
  local all, oldest, first = redis.call('HGETALL', KEYS[1]), nil, math.huge
  for i = 1, #all, 2 do
    local ms = tonumber(string.match(all[i + 1], '^%d+'))
    if ms < first and all[i] ~= answer then oldest, first = all[i], ms end
  end
  redis.call('HDEL', KEYS[1], oldest)
  redis.call('HDEL', KEYS[2], oldest)
end
return 1
