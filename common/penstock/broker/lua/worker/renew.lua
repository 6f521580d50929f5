-- KEYS stream episodes...
-- ARGV group consumer alive_ms entries...
-- USES mine
--
-- Resets the idle time of those entries that this consumer still holds, and keeps their finished episodes for alive_ms.
-- Answers 1.
--
-- Repeated, it resets them again.
for _, entry in ipairs(entries) do
  if mine(stream, entry) then redis.call('XCLAIM', stream, group, consumer, '0', entry, 'JUSTID') end
end
for _, each in ipairs(episodes) do redis.call('PEXPIRE', each, alive_ms) end
return 1
