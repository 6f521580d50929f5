-- KEYS source dead scored live scored_waiting episodes identity source_waiting failures deaths
-- ARGV group consumer entry ticket attempt reason stage payload parts kind digest
-- ARGV has_failed has_died max_failures max_deaths
-- USES mine bury wake stranger released
--
-- Makes an entry free at once. It counts the failure or the death of an engine, and buries an entry that has had too
-- many of them; a failure under another configuration than the run's counts nothing.
-- Answers free, buried, or late if the entry was no longer this consumer's.
--
-- Repeated, it answers late and counts nothing twice.
if not mine(source, entry) then return 'late' end

local function count(counts, increment)
  if increment == '0' or is_stranger then return tonumber(redis.call('HGET', counts, ticket) or '0') end
  return redis.call('HINCRBY', counts, ticket, increment)
end

local num_failures, num_deaths = count(failures, has_failed), count(deaths, has_died)
if num_failures >= tonumber(max_failures) or num_deaths >= tonumber(max_deaths) then
  bury()
  return 'buried'
end
release(source, {entry})
wake(source_waiting, 1)
return 'free'
