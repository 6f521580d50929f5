-- KEYS lease
-- ARGV token
--
-- Gives the lease up, so that another trainer need not wait for it to expire.
-- Answers 1, or 0 if this trainer did not hold it.
--
-- Repeated, it answers 0: a lease of another token stays.
if redis.call('GET', lease) == token then return redis.call('DEL', lease) end
return 0
