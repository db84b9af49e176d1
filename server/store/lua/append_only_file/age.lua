-- uses: prelude
-- KEYS: rewrite, of each server. Returns for how long one of the files may have held erased data (ms).
local age = 0
for _, key in ipairs(KEYS) do
  age = math.max(age, now - tonumber(redis.call('HGET', key, 'first') or redis.call('HGET', key, 'due') or now))
end
return age
