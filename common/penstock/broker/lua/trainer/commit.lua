-- KEYS lease ledger scored live counters parts...
-- ARGV token group record counter is_drop ledger_end groups(ticket entry)...
-- USES require_lease unlink
--
-- The commit point: appends a record to the ledger, and then acknowledges and deletes the groups that it covers.
--   counter: the counter of these tickets, empty if there is none
--   is_drop: 1 if the tickets end with this record, 0 if they are trained and end with the version that includes them
--   ledger_end: the entry that the ledger must end with, empty if it was not read
--   entry: of the ticket's scored group, empty if it has none
-- Answers the entry of the record, or the error _LOST if the ledger ends with another entry than ledger_end.
--
-- Repeated, it appends nothing twice and counts nothing twice: the ledger already ends with the record.
local last = redis.call('XREVRANGE', ledger, '+', '-', 'COUNT', '1')
if #last > 0 and last[1][2][2] == record then return last[1][1] end
if ledger_end ~= '' and ledger_end ~= (#last > 0 and last[1][1] or '0') then
  return redis.error_reply('_LOST the ledger ends with ' .. (#last > 0 and last[1][1] or 'nothing'))
end
local id = redis.call('XADD', ledger, '*', 'r', record)
for _, each in ipairs(groups) do
  if each.entry ~= '' then
    redis.call('XACK', scored, group, each.entry)
    redis.call('XDEL', scored, each.entry)
  end
  if is_drop == '1' then
    redis.call('HDEL', live, each.ticket)
  else
    redis.call('HSET', live, each.ticket, 'committed|' .. id .. '|')
  end
  if counter ~= '' then redis.call('HINCRBY', counters, counter, 1) end
end
unlink()
return id
