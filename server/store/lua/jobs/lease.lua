-- uses: prelude
-- A lease with more time left than its full length was granted before the clock was set back; it counts as expired.
local function is_open(job)
  local state = redis.call('HGET', job, 'state')
  return state == 'queued' or state == 'running'
end
local function lease_left(job)
  local ends, length = unpack(redis.call('HMGET', job, 'lease_until', 'lease_ms'))
  local left = tonumber(ends or 0) - now
  return left > 0 and left <= tonumber(length or left) and left or 0
end
local function finish(job, state, leaves_samples)
  redis.call('HSET', job, 'state', state, 'ended_ms', now)
  redis.call('HDEL', job, 'lease', 'lease_until', 'lease_ms')
  if redis.call('HGET', job, 'forgets') == '1' and not leaves_samples then
    redis.call('DEL', (string.gsub(job, 'job:%d+$', 'samples')))
  end
end
