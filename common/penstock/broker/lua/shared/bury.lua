-- USES locate wake
--
-- bury(): moves an entry to `dead`, and informs the trainer with an entry without payload in `scored`.
-- The finished episodes of its ticket are deleted.
-- Needs: source, dead, scored, live, scored_waiting, episodes, group, entry, ticket, attempt, reason, stage, payload, parts.
local function bury()
  local fields = {'t', ticket, 'a', attempt, 'x', reason, 's', stage, 'p', payload}
  if parts ~= '' then fields[11], fields[12] = 'n', parts end
  redis.call('XADD', dead, '*', unpack(fields))
  if ticket ~= '' and source ~= scored then
    local note = redis.call('XADD', scored, '*', 't', ticket, 'a', attempt, 'x', reason)
    locate('scored|' .. note .. '|' .. attempt)
    wake(scored_waiting, 1)
  end
  redis.call('UNLINK', episodes)
  redis.call('XACK', source, group, entry)
  redis.call('XDEL', source, entry)
end
