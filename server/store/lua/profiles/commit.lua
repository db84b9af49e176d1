-- uses: prelude
-- KEYS: record, items, vectors, epoch, feedback, samples, learned. ARGV: as named, `stays_s` is 0 if texts are kept;
-- id, item and vector of each put, empty if unchanged; ids to drop before that. Returns 1 if written, 0 if the record
-- has changed, -1 if the user was erased or the write of an unknown one has no mark.
local expected, record, epoch, stays_s, puts = unpack(ARGV, 1, 5)  -- all of them may be more than Lua's stack
local current = redis.call('GET', KEYS[1]) or ''
if current == record then
  redis.call('SET', KEYS[1], current)
  return 1
end
if erased_since(KEYS[4], epoch) or (current == '' and not string.find(epoch, '+', 1, true)) then return -1 end
if current ~= expected then return 0 end
redis.call('SET', KEYS[1], record)
if current == '' then redis.call('PERSIST', KEYS[5]) end  -- of a person without a profile it expires
local drops = 6 + 3 * tonumber(puts)
for i = drops, #ARGV do
  redis.call('HDEL', KEYS[2], ARGV[i])
  redis.call('HDEL', KEYS[3], ARGV[i])
end
for i = 6, drops - 1, 3 do
  local id, item, vector = unpack(ARGV, i, i + 2)
  if item ~= '' then redis.call('HSET', KEYS[2], id, item) end
  if vector ~= '' then redis.call('HSET', KEYS[3], id, vector) end
end
for _, texts in ipairs({KEYS[2], KEYS[7], stays_s ~= '0' and KEYS[6] or nil}) do
  if stays_s == '0' then redis.call('PERSIST', texts) else redis.call('EXPIRE', texts, stays_s, 'NX') end
end
return 1
