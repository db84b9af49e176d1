-- uses: prelude, jobs/lease, jobs/repeated
-- KEYS: jobs, epoch, adapter. ARGV: JSON (`JobStore.find_duplicate`). Returns the number of the job that an earlier
-- copy of the submission created, 0 if there is none, -1 if the user was erased.
local given = cjson.decode(ARGV[1])
if erased_since(KEYS[2], given.epoch) then return -1 end
local last = redis.call('HGET', KEYS[1], 'last')
local number = last and repeated(given, tonumber(last), KEYS[3])
if number then redis.call('HSET', KEYS[1], 'last', last) end
return number or 0
