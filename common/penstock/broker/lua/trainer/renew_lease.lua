-- KEYS lease last_number
-- ARGV token alive_ms
-- USES holder
--
-- Holds the lease for alive_ms from now on. A lease that expired while its holder was frozen, or the queue away, is
-- held again if nobody has had it since. Answers 1, or the error _FENCED and who holds it.
--
-- Repeated, it renews again.
if not holder and redis.call('GET', last_number) == string.match(token, '^%d+') then
  redis.call('SET', lease, token, 'PX', alive_ms)
  return 1
end
if holder ~= token then return lease_lost() end
redis.call('PEXPIRE', lease, alive_ms)
return 1
