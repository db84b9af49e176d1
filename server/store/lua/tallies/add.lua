-- uses: prelude
-- KEYS: a hash; for a user's also the epoch. ARGV: epoch, expiry (s; 0: none), token of this call (empty: none), then
-- fields with numbers to add to theirs. A call that is repeated, as its answer was lost, adds nothing. Returns whether
-- the user is not erased.
local epoch, expiry_s, token = unpack(ARGV)
if KEYS[2] and erased_since(KEYS[2], epoch) then return 0 end
if token ~= '' then
  if redis.call('HGET', KEYS[1], 'token') == token then return 1 end
  redis.call('HSET', KEYS[1], 'token', token)
end
for i = 4, #ARGV, 2 do
  local before, sums = string.gmatch(redis.call('HGET', KEYS[1], ARGV[i]) or '', '%S+'), {}
  for number in string.gmatch(ARGV[i + 1], '%S+') do
    sums[#sums + 1] = string.format('%.17g', number + (before() or 0))
  end
  redis.call('HSET', KEYS[1], ARGV[i], table.concat(sums, ' '))
end
if expiry_s ~= '0' then redis.call('EXPIRE', KEYS[1], expiry_s) end
return 1
