-- uses: prelude
-- KEYS: as `keys.of_user`, the tombstone last. Returns the tombstone's counts, none for an unknown user, or nothing if
-- the user exists and the deadline has passed. It always writes, for it may be repeated (`RedisConnection.write`).
local prefix, kept_jobs, stays_s, epoch, until_ms, rewritten_by = unpack(ARGV)
local job_numbers, _, items, _, samples, feedback, learned = unpack(KEYS)
local adapter, tombstone = KEYS[#KEYS - 1], KEYS[#KEYS]
if now > tonumber(until_ms) and redis.call('EXISTS', unpack(KEYS, 1, #KEYS - 1)) > 0 then return {} end
local _, adapters = string.gsub(table.concat(redis.call('HKEYS', adapter), ' '), 'raw', '')
local counts = {
  'items', redis.call('HLEN', items), 'samples', redis.call('LLEN', samples) + redis.call('HLEN', learned),
  'adapters', adapters, 'feedback', redis.call('HLEN', feedback)
}
local jobs, banks, last = 0, {}, tonumber(redis.call('HGET', job_numbers, 'last') or 0)
for number = math.max(1, last - kept_jobs), last do
  banks[#banks + 1] = redis.call('HGET', prefix .. number, 'bank') or nil
  jobs = jobs + redis.call('DEL', prefix .. number)
end
local keys = jobs + redis.call('DEL', unpack(KEYS, 1, #KEYS - 1))
local moved_to = string.match(redis.call('HGET', tombstone, 'epoch') or '', '^>%w+ ') or ''
redis.call('HSET', tombstone, 'epoch', moved_to .. epoch)
redis.call('HDEL', tombstone, 'mark')
if keys > 0 then
  redis.call('HSET', tombstone, 'jobs', jobs, 'keys', keys, 'rewritten_by', rewritten_by,
    'banks', table.concat(banks, ' '), unpack(counts))
  if moved_to ~= '' then redis.call('HSET', tombstone, 'until_ms', now + stays_s * 1000) end
  if redis.call('TTL', tombstone) < tonumber(stays_s) then redis.call('EXPIRE', tombstone, stays_s) end
elseif moved_to == '' and redis.call('HEXISTS', tombstone, 'keys') == 0 then
  redis.call('DEL', tombstone)
end
local counted = {'items', 'samples', 'jobs', 'adapters', 'keys', 'feedback'}
return redis.call('HMGET', tombstone, 'rewritten_by', 'banks', unpack(counted))
