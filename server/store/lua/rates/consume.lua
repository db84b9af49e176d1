-- uses: prelude
-- KEYS: a bucket for each use: amount used, time of that value, µs, and the limit then: of a higher one no more counts
-- than of the present one. A bucket expires when it is empty.
-- ARGV: whether to count even if a use does not fit, `MOST_DEBT`, then most, window (µs) and amount of each use.
-- Returns for each use whether it fits, and the amount used. Counts nothing unless all fit.
local now, debt = time[1] * 1000000 + time[2], tonumber(ARGV[2])
local fit, used, ahead, all = {}, {}, {}, true
for i = 1, #KEYS do
  local most, window, amount = tonumber(ARGV[i * 3]), tonumber(ARGV[i * 3 + 1]), tonumber(ARGV[i * 3 + 2])
  local known = redis.call('GET', KEYS[i])
  used[i] = 0
  if known then
    local before, at, of = string.match(known, '^(%S+) (%S+) ?(%S*)$')
    local leaked = math.max(0, now - tonumber(at)) * most / window
    used[i] = math.max(0, math.min(tonumber(of) == most and math.huge or most, tonumber(before)) - leaked)
    ahead[i] = tonumber(at) > now  -- the clock was set back: restart the leak from now
  end
  fit[i] = used[i] + amount <= most
  all = all and fit[i]
end
local answer = {}
for i = 1, #KEYS do
  local most, window, amount = tonumber(ARGV[i * 3]), tonumber(ARGV[i * 3 + 1]), tonumber(ARGV[i * 3 + 2])
  local counts = amount ~= 0 and (ARGV[1] == '1' or all)
  if counts then used[i] = math.max(0, math.min(debt * most, used[i] + amount)) end
  local left_ms = math.ceil(used[i] * window / most / 1000)
  if (counts or ahead[i]) and left_ms > 0 then
    redis.call('SET', KEYS[i], string.format('%.17g %.0f %.17g', used[i], now, most), 'PX', left_ms)
  elseif counts then
    redis.call('DEL', KEYS[i])
  end
  answer[i * 2 - 1], answer[i * 2] = fit[i] and 1 or 0, string.format('%.17g', used[i])
end
return answer
