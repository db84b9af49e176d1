-- KEYS: record, adapter. Returns the record, then fields and values of the adapter without the bytes.
local found = {redis.call('GET', KEYS[1]) or ''}
for _, field in ipairs(redis.call('HKEYS', KEYS[2])) do
  found[#found + 1] = field
  found[#found + 1] = string.sub(field, 1, 3) == 'raw' and '' or redis.call('HGET', KEYS[2], field)
end
return found
