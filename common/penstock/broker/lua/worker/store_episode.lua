-- KEYS source episodes identity
-- ARGV group consumer entry index episode alive_ms kind digest
-- USES mine stranger
--
-- Keeps a finished episode of a ticket that this consumer holds, for alive_ms from now; the first one of an index stays.
-- Answers kept, or late if the entry was no longer this consumer's: nothing is kept, since its key would outlive it. Or
-- the error _STRANGER: the episode is not one of the run.
--
-- The bytes go through Lua, unlike those of a part: one copy of what took seconds to make, for a check and a write that
-- no other worker comes between.
--
-- Repeated, it keeps the first one, and the time begins again.
if is_stranger then return refused() end
if not mine(source, entry) then return 'late' end
redis.call('HSETNX', episodes, index, episode)
redis.call('PEXPIRE', episodes, alive_ms)
return 'kept'
