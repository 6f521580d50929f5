-- locate(where): notes in `live` where the ticket is from now on, as stage|entry|attempt.
-- Evaluation tickets are not outstanding work and are not in `live`. A trained ticket stays trained, whatever
-- happens to a second message of it. Needs: live, ticket.
local function locate(where)
  local was = redis.call('HGET', live, ticket)
  if was and string.sub(was, 1, 10) ~= 'committed|' then redis.call('HSET', live, ticket, where) end
end
