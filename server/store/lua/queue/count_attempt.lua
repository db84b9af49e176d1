-- Do not count a user who has left the queue: nothing would ever remove an erased user's count.
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
return redis.call('HINCRBY', KEYS[3], ARGV[1], 1)
