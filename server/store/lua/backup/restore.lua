-- KEYS: keys of one slot. ARGV: expiry (ms) and content of each. Returns the server's error, or an empty string.
for i, name in ipairs(KEYS) do
  local done = redis.pcall('RESTORE', name, ARGV[2 * i - 1], ARGV[2 * i], 'ABSTTL', 'REPLACE')
  if done.err then return done.err end
end
return ''
