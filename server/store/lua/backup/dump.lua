-- KEYS: the names of a user's keys, beginning with `jobs`, or the name of a shared key. ARGV, for a user: prefix of job
-- names, number of kept jobs. Returns name, expiry (ms) and content of each key that exists.
local names, last, found = {unpack(KEYS)}, 0, {}
if ARGV[1] then last = tonumber(redis.call('HGET', KEYS[1], 'last') or 0) end
for number = math.max(1, last - (ARGV[2] or 0)), last do names[#names + 1] = ARGV[1] .. number end
for _, name in ipairs(names) do
  local content, at = redis.call('DUMP', name), #found
  if content then
    found[at + 1], found[at + 2], found[at + 3] = name, math.max(0, redis.call('PEXPIRETIME', name)), content
  end
end
return found
