-- KEYS: record, epoch. ARGV: a new mark and its life (s). Returns the epoch, and `+` and the mark of an unknown user.
local epoch, mark = unpack(redis.call('HMGET', KEYS[2], 'epoch', 'mark'))
if redis.call('EXISTS', KEYS[1]) == 1 then return epoch or '' end
if not mark then
  mark = ARGV[1]
  redis.call('HSET', KEYS[2], 'mark', mark)
end
if redis.call('TTL', KEYS[2]) < tonumber(ARGV[2]) then redis.call('EXPIRE', KEYS[2], ARGV[2]) end
return (epoch or '') .. '+' .. mark
