-- uses: jobs/lease
-- KEYS: record, items, vectors, samples, feedback, learned, adapter, jobs. ARGV: prefix of job names. Returns record
-- and bytes, whether there is an adapter and whether one is being trained.
local record, bytes = redis.call('GET', KEYS[1]), 0
for i = 1, 7 do bytes = bytes + (redis.call('MEMORY', 'USAGE', KEYS[i], 'SAMPLES', 0) or 0) end
local last = redis.call('HGET', KEYS[8], 'last')
return {record, bytes, redis.call('EXISTS', KEYS[7]), last and is_open(ARGV[1] .. last) and 1 or 0}
