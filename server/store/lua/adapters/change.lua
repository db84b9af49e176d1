-- `given` is `KeptVersions.change`, `raw` the bytes of a new version.
local function serve(key, given, raw)
  local to = cjson.decode(given.to)
  if given.left ~= '' then
    local number = cjson.decode(given.left).number
    redis.call('HSET', key, 'raw:' .. number, redis.call('HGET', key, 'raw'), 'facts:' .. number, given.left)
  end
  for _, number in ipairs(given.dropped) do redis.call('HDEL', key, 'raw:' .. number, 'facts:' .. number) end
  redis.call('HSET', key, 'id', to.note.id, 'recipe', to.note.recipe, 'sha256', to.sha256,
    'raw', raw or redis.call('HGET', key, 'raw:' .. to.number), 'facts:' .. to.number, given.to)
  redis.call('HDEL', key, 'raw:' .. to.number, 'chosen_ms')
end
