-- KEYS source dead scored live scored_wake
-- ARGV group consumer entry ticket attempt reason stage payload parts
-- USES mine bury
--
-- Moves an entry that nobody can use to `dead`; the trainer then ends its ticket as poison.
-- Answers buried, or late if the entry was no longer this consumer's and stays where it is.
--
-- Repeated, it answers late: the entry is gone from its stream.
if not mine(source, entry) then return 'late' end
bury()
return 'buried'
