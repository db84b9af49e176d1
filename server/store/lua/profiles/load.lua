-- KEYS: record, epoch.
return {redis.call('GET', KEYS[1]), redis.call('HGET', KEYS[2], 'epoch')}
