-- KEYS launcher
-- ARGV token
--
-- Ends a launcher's hold of the run. Answers 1, or 0 if another launcher holds it.
--
-- Repeated, it answers 0.
if redis.call('GET', launcher) == token then return redis.call('DEL', launcher) end
return 0
