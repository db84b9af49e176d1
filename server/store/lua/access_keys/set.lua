-- uses: access_keys/changed
local field, value = unpack(ARGV, 3)
if value == '' then redis.call('HDEL', KEYS[1], field) else redis.call('HSET', KEYS[1], field, value) end
changed(field)
