-- KEYS lease scored live tickets tickets_waiting parts...
-- ARGV token group entry ticket attempt payload
-- USES require_lease wake unlink
--
-- Reissues a ticket whose scored group cannot be trained, and deletes that group.
-- Answers 1, or 0 if that attempt has been issued already.
--
-- Repeated, it answers 0: `live` holds the attempt.
local place = redis.call('HGET', live, ticket)
if place and string.match(place, '[^|]*$') == attempt then return 0 end
local id = redis.call('XADD', tickets, '*', 't', ticket, 'a', attempt, 'p', payload)
redis.call('HSET', live, ticket, 'tickets|' .. id .. '|' .. attempt)
redis.call('XACK', scored, group, entry)
redis.call('XDEL', scored, entry)
unlink()
wake(tickets_waiting, 1)
return 1
