-- KEYS identity launcher
-- ARGV token alive_ms kind digest folder
-- USES stranger
--
-- Lets a launcher hold the run for alive_ms from now on. A hold that expired while the queue was away is held again
-- unless the run has become another's. Answers 1, or the error _STRANGER.
--
-- Repeated, it renews again.
local holder = redis.call('GET', launcher)
local known_folder = redis.call('HGET', identity, 'folder')
if holder and holder ~= token or is_stranger or known_folder and known_folder ~= folder then return refused() end
-- A full Redis refuses SET, but not PEXPIRE.
if holder then return redis.call('PEXPIRE', launcher, alive_ms) end
redis.call('SET', launcher, token, 'PX', alive_ms)
return 1
