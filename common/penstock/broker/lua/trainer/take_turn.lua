-- KEYS lease turn
-- ARGV token number
-- USES require_lease
--
-- Gives the turn on the GPUs to the trainer: its turn with this number. Answers 1.
--
-- Repeated, it writes the same again.
redis.call('SET', turn, token .. '/' .. number)
return 1
