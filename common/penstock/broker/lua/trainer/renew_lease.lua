-- KEYS lease last_number identity
-- ARGV token alive_ms kind digest folder
-- USES holder stranger
--
-- Holds the lease for alive_ms from now on. A lease that expired while its holder was frozen, or the queue away, is
-- held again if nobody has had it since, and the run has not become another's. Answers 1, or the error _FENCED and who
-- holds it.
--
-- Repeated, it renews again.
local known_folder = redis.call('HGET', identity, 'folder') or folder
local is_another = is_stranger or known_folder ~= folder
if not holder and not is_another and redis.call('GET', last_number) == string.match(token, '^%d+') then
  redis.call('SET', lease, token, 'PX', alive_ms)
  return 1
end
if holder ~= token then return lease_lost() end
redis.call('PEXPIRE', lease, alive_ms)
return 1
