-- KEYS lease policy live counters tickets tickets_waiting failures deaths
-- ARGV token number digest path lease_number canary chunks resolved issued(ticket attempt payload)...
-- USES require_lease wake
--
-- Issues tickets. If `number` is not empty, it also announces that version, and forgets the tickets that the version
-- includes: `resolved`, with spaces between. Answers 1.
--
-- Repeated, it issues nothing twice: `live` holds the attempt of each ticket.
local next_number = tonumber(redis.call('HGET', counters, 'next') or '0')
for _, each in ipairs(issued) do
  local place = redis.call('HGET', live, each.ticket)
  if not place or string.match(place, '[^|]*$') ~= each.attempt then
    local id = redis.call('XADD', tickets, '*', 't', each.ticket, 'a', each.attempt, 'p', each.payload)
    redis.call('HSET', live, each.ticket, 'tickets|' .. id .. '|' .. each.attempt)
    if tonumber(each.ticket) >= next_number then
      next_number = tonumber(each.ticket) + 1
      redis.call('HINCRBY', counters, 'issued', 1)
    end
  end
end
redis.call('HSET', counters, 'next', next_number)
if number ~= '' then
  redis.call('HSET', policy, 'number', number, 'digest', digest, 'path', path, 'lease', lease_number, 'canary', canary)
  if chunks == '' then
    redis.call('HDEL', policy, 'chunks')
  else
    redis.call('HSET', policy, 'chunks', chunks)
  end
end
for ticket in string.gmatch(resolved, '%S+') do
  redis.call('HDEL', live, ticket)
  redis.call('HDEL', failures, ticket)
  redis.call('HDEL', deaths, ticket)
end
wake(tickets_waiting, #issued)
return 1
