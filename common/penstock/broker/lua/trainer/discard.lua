-- KEYS lease scored parts...
-- ARGV token group entry
-- USES require_lease unlink
--
-- Deletes a scored group that is not needed any more: a duplicate, or an evaluation result that was counted.
-- Answers 1, or 0 if it is gone already.
--
-- Repeated, it answers 0.
redis.call('XACK', scored, group, entry)
unlink()
return redis.call('XDEL', scored, entry)
