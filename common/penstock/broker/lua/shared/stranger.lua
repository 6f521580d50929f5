-- is_stranger: whether the run is of another configuration than that of this process, as far as a service of its kind
-- reads it. A run that nobody has begun is of none. refused(): the error for a stranger. Needs: identity, kind, digest.
local known_digest = redis.call('HGET', identity, kind)
local is_stranger = known_digest and known_digest ~= digest

local function refused()
  return redis.error_reply('_STRANGER')
end
