-- KEYS: tally. ARGV: week. Removes the fields of that week and returns them.
local all, taken = redis.call('HGETALL', KEYS[1]), {}
for i = 1, #all, 2 do
  if string.find(all[i], ARGV[1] .. '.', 1, true) == 1 then
    taken[#taken + 1], taken[#taken + 2] = all[i], all[i + 1]
    redis.call('HDEL', KEYS[1], all[i])
  end
end
return taken
