-- KEYS stream
-- ARGV group consumer entries...
-- USES mine
--
-- Resets the idle time of those entries that this consumer still holds. Answers 1.
--
-- Repeated, it resets them again.
for _, entry in ipairs(entries) do
  if mine(stream, entry) then redis.call('XCLAIM', stream, group, consumer, '0', entry, 'JUSTID') end
end
return 1
