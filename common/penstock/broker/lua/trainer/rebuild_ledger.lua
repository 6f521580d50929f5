-- KEYS lease rebuilt
-- ARGV token position records...
-- USES require_lease
--
-- Adds records to the copy of a ledger that the queue has lost. `position`: the records that it holds before these; 0
-- begins it anew. Answers 1, or the error _LOST if it holds fewer.
--
-- Repeated, it adds nothing twice: the copy already holds more than `position`.
if position == '0' then redis.call('DEL', rebuilt) end
local held = redis.call('XLEN', rebuilt)
if held < tonumber(position) then
  return redis.error_reply('_LOST the rebuilt ledger has ' .. held .. ' records')
end
for n = held - tonumber(position) + 1, #records do
  redis.call('XADD', rebuilt, '*', 'r', records[n])
end
return 1
