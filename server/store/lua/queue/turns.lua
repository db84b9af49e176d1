-- A score is exact up to 2^52: turns from 0 to 2^21 - 1, and seconds. The field `<class>` of the turns is the one being
-- served, `<class>:<tenant>` the tenant's next.
local turns, turn_length = 2^21, 2^31
local function turn(field) return tonumber(redis.call('HGET', KEYS[4], field) or 0) end
