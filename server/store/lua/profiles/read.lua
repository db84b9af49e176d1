-- KEYS: record, items, vectors, epoch. Read atomically.
return {redis.call('GET', KEYS[1]), redis.call('HGETALL', KEYS[2]), redis.call('HGETALL', KEYS[3]),
  redis.call('HGET', KEYS[4], 'epoch')}
