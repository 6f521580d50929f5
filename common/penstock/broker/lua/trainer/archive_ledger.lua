-- KEYS lease ledger rebuilt
-- ARGV token record first ledger_end
-- USES require_lease
--
-- Replaces the ledger's entries before `first` by one, which begins it; the others keep their ids. Answers 1, or the
-- error _LOST if the ledger ends with another entry than ledger_end.
--
-- Repeated, it answers 1: the ledger already begins with the record.
local last = redis.call('XREVRANGE', ledger, '+', '-', 'COUNT', '1')
if #last == 0 or ledger_end ~= last[1][1] then
  return redis.error_reply('_LOST the ledger ends with ' .. (#last > 0 and last[1][1] or 'nothing'))
end
local begin = redis.call('XRANGE', ledger, '-', '+', 'COUNT', '1')
if begin[1][2][2] == record then return 1 end
redis.call('DEL', rebuilt)
redis.call('XADD', rebuilt, '0-1', 'r', record)
for _, each in ipairs(redis.call('XRANGE', ledger, first, '+')) do
  redis.call('XADD', rebuilt, each[1], 'r', each[2][2])
end
redis.call('RENAME', rebuilt, ledger)
return 1
