-- holder: the token in the lease, false if nobody holds it. lease_lost(): the error for a trainer that lost it.
-- Needs: lease, token.
local function number_of(any_token) return tonumber(string.match(any_token, '^%d+')) end

local holder = redis.call('GET', lease)
-- Numbers only grow: a lower one comes back only if the queue has lost its last writes.
if holder and number_of(holder) < number_of(token) then holder = false end

local function lease_lost()
  return redis.error_reply('_FENCED ' .. (holder or 'nobody'))
end
