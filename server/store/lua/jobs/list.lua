-- KEYS: jobs. ARGV: prefix of job names, number of kept jobs, fields. Returns number and fields of each job.
local last, found = tonumber(redis.call('HGET', KEYS[1], 'last') or 0), {}
for number = math.max(1, last - ARGV[2] + 1), last do
  found[#found + 1] = {number, redis.call('HMGET', ARGV[1] .. number, unpack(ARGV, 3))}
end
return found
