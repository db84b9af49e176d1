-- KEYS of every script: the hash, the list of changes. ARGV: id for a new ring, step of the revision, then its own. A
-- repeated call changes nothing.
local function changed(field)
  local before = redis.call('HGET', KEYS[1], 'revision') or '0'
  redis.call('HINCRBY', KEYS[1], 'revision', ARGV[2])
  redis.call('HSETNX', KEYS[1], 'ring', ARGV[1])
  redis.call('RPUSH', KEYS[2], before .. ' ' .. redis.call('HGET', KEYS[1], 'revision') .. ' ' .. field)
  redis.call('LTRIM', KEYS[2], -100, -1)
end
