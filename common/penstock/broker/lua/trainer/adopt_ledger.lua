-- KEYS lease ledger rebuilt counters
-- ARGV token counts(name count)...
-- USES require_lease
--
-- Makes the rebuilt copy the ledger, with the counters that follow from it. Answers 1, or 0 if there is a ledger.
--
-- Repeated, it answers 0.
if redis.call('EXISTS', ledger) == 1 then return 0 end
for _, each in ipairs(counts) do
  redis.call('HSET', counters, each.name, each.count)
end
redis.call('RENAME', rebuilt, ledger)
return 1
