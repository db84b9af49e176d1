-- uses: prelude, jobs/lease, adapters/change
-- KEYS: job; to promote an adapter also record, adapter, epoch. ARGV: JSON (`_outcome` in `jobs.py`); to promote also
-- what `serve` needs in it, the expected record, the new one, the adapter's bytes. Returns whether all was written.
local given = cjson.decode(ARGV[1])
if redis.call('HGET', KEYS[1], 'ended_by') == given.token then
  redis.call('HSET', KEYS[1], 'ended_by', given.token)
  return 1
end
if redis.call('HGET', KEYS[1], 'lease') ~= given.token then return 0 end
if #KEYS > 1 then
  local expected, record, raw = unpack(ARGV, 2)
  if has_left(KEYS[4]) or redis.call('HGET', KEYS[1], 'bank') ~= given.bank then return 0 end
  if redis.call('GET', KEYS[2]) ~= expected then return 0 end
  serve(KEYS[3], given, raw)
  redis.call('SET', KEYS[2], record)
end
redis.call('HSET', KEYS[1], 'ended_by', given.token, 'before', given.before, 'after', given.after,
  'served', given.served, 'error', given.error, 'adapter', given.adapter)
finish(KEYS[1], given.state)
return 1
