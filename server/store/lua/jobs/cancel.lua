-- uses: prelude, jobs/lease
-- KEYS: job, epoch. Returns whether this call ended it, -1 if the user left this key.
local token = ARGV[1]
if has_left(KEYS[2]) then return -1 end
local state, ended_by = unpack(redis.call('HMGET', KEYS[1], 'state', 'ended_by'))
if not is_open(KEYS[1]) then
  if state then redis.call('HSET', KEYS[1], 'state', state) end
  return ended_by == token and 1 or 0
end
redis.call('HSET', KEYS[1], 'ended_by', token)
finish(KEYS[1], 'cancelled')
return 1
