-- KEYS: count. ARGV: expiry (s), then user keys, each with `<bytes> <adapters>`, empty for an unknown user.
local function add(text, sign)
  local bytes, adapters = string.match(text or '', '^(%d+) (%d+)$')
  if not bytes then return end
  redis.call('HINCRBY', KEYS[1], 'people', sign)
  redis.call('HINCRBY', KEYS[1], 'bytes', sign * bytes)
  redis.call('HINCRBY', KEYS[1], 'adapters', sign * adapters)
end
for i = 2, #ARGV, 2 do
  add(redis.call('HGET', KEYS[1], ARGV[i]), -1)
  add(ARGV[i + 1], 1)
  redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  if ARGV[i + 1] == '' then redis.call('HDEL', KEYS[1], ARGV[i]) end
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
