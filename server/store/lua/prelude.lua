-- Times are in ms, of the server's clock.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function has_left(key)  -- for the key of another secret (`rotation.py`)
  return string.sub(redis.call('HGET', key, 'epoch') or '', 1, 1) == '>'
end
local function is_as_seen(key, seen)  -- as `ProfileStore.begin` returned it; without a mark while no tombstone says no
  local epoch, mark = unpack(redis.call('HMGET', key, 'epoch', 'mark'))
  local seen_epoch, seen_mark = string.match(seen, '^([^+]*)%+?(.*)$')
  return (not epoch or epoch == seen_epoch) and (seen_mark == '' or mark == seen_mark)
end
-- Since a write began a user was erased if there is a tombstone with another epoch, or the mark that it left is gone.
local function erased_since(key, seen) return has_left(key) or not is_as_seen(key, seen) end
