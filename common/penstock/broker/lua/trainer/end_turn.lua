-- KEYS lease turn
-- ARGV token
-- USES require_lease
--
-- Gives the turn on the GPUs to the engines. Answers 1, or 0 if it was theirs.
--
-- Repeated, it answers 0.
return redis.call('DEL', turn)
