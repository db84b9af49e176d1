-- uses: prelude, jobs/lease
-- Returns the number of the job that an earlier copy of a submission (JSON of `JobStore`) created, or nil; `last` is
-- the number of the user's newest job, and `adapter` the key of the adapter that serves.
local function repeated(given, last, adapter)
  local function name(number) return given.prefix .. number end
  if given.idempotency_key ~= '' then
    for number = last, math.max(1, last - given.kept + 1), -1 do
      if redis.call('HGET', name(number), 'key') == given.idempotency_key then return number end
    end
    return nil
  end
  local token, made = unpack(redis.call('HMGET', name(last), 'token', 'adapter'))
  -- a background job is alike each time, for what it learns from is in the store
  local serves = not given.background and (made or '') ~= '' and made == redis.call('HGET', adapter, 'id')
  return (is_open(name(last)) or serves) and token == given.token and last or nil
end
