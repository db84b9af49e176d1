-- uses: prelude, jobs/lease, jobs/repeated
-- KEYS: jobs, samples, epoch, adapter. ARGV: JSON (`JobStore.submit`), then the samples. Returns the job's number and
-- whether this call made it; instead of a number 0 for too many samples or an open job that is not to be replaced, -1
-- if the user was erased, -2 if the deadline has passed.
local given = cjson.decode(ARGV[1])
if erased_since(KEYS[3], given.epoch) then return {-1, 0} end

local last = tonumber(redis.call('HGET', KEYS[1], 'last') or given.number_before)
local function name(number) return given.prefix .. number end
local known = repeated(given, last, KEYS[4])
if known then
  redis.call('HSET', KEYS[1], 'last', last)
  return {known, redis.call('HGET', name(known), 'made_by') == given.call and 1 or 0}
end
if given.background and is_open(name(last)) and redis.call('HGET', name(last), 'bank') == given.bank then
  return {0, 0}
end
if now > given.until_ms then return {-2, 0} end
redis.call('EXISTS', name(last + 1))  -- a server whose slot moves refuses new keys: here, before anything is written

local seen, kept, fresh = {}, 0, {}
for _, sample in ipairs(given.append and redis.call('LRANGE', KEYS[2], 0, -1) or {}) do
  seen[sample], kept = true, kept + 1
end
for i = 2, #ARGV do
  if not seen[ARGV[i]] then seen[ARGV[i]], fresh[#fresh + 1] = true, ARGV[i] end
end
if kept + #fresh > given.max_samples then return {0, 0} end
if not given.append then redis.call('DEL', KEYS[2]) end
for _, sample in ipairs(fresh) do redis.call('RPUSH', KEYS[2], sample) end
if given.forgets_s > 0 then redis.call('EXPIRE', KEYS[2], given.forgets_s) end

local number = last + 1
redis.call('HSET', KEYS[1], 'last', number)
redis.call('DEL', name(number - given.kept))
for older = math.max(1, number - given.kept + 1), last do
  if is_open(name(older)) then finish(name(older), 'superseded', true) end
end
redis.call('HSET', name(number), 'state', 'queued', 'config', given.config, 'created_ms', now, 'bank', given.bank,
  'epoch', redis.call('HGET', KEYS[3], 'epoch') or '', 'token', given.token, 'key', given.idempotency_key,
  'traceparent', given.traceparent, 'made_by', given.call, 'background', given.background and 1 or 0,
  'forgets', given.forgets_s > 0 and 1 or 0)
return {number, 1}
