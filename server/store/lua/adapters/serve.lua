-- uses: prelude, jobs/lease, adapters/change
-- KEYS: record, adapter, epoch, jobs. ARGV: JSON for `serve`, the expected record, the new one, prefix of job names. An
-- open job that no client asked for ends. Returns 1 if all was written, 0 if the record changed, -1 if the user left.
local given, expected, record, prefix = cjson.decode(ARGV[1]), unpack(ARGV, 2)
if has_left(KEYS[3]) then return -1 end
local current = redis.call('GET', KEYS[1])
if current ~= expected and current ~= record then return 0 end
if current == expected and given.left ~= given.to then
  serve(KEYS[2], given)
  redis.call('HSET', KEYS[2], 'chosen_ms', now)
  local newest = prefix .. (redis.call('HGET', KEYS[4], 'last') or '')
  if is_open(newest) and redis.call('HGET', newest, 'background') == '1' then finish(newest, 'superseded') end
end
redis.call('SET', KEYS[1], record)
return 1
