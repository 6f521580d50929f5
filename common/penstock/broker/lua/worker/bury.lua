-- KEYS source dead scored live scored_waiting episodes identity
-- ARGV group consumer entry ticket attempt reason stage payload parts kind digest
-- USES mine bury stranger
--
-- Moves an entry that nobody can use to `dead`; the trainer then ends its ticket as poison.
-- Answers buried, or late if the entry was no longer this consumer's and stays where it is; or the error _STRANGER: with
-- the run's configuration others may be able to use it.
--
-- Repeated, it answers late: the entry is gone from its stream.
if is_stranger then return refused() end
if not mine(source, entry) then return 'late' end
bury()
return 'buried'
