-- now(): Unix milliseconds of the server. A script that writes may read the clock: Redis replicates its effects, not
-- the script.
local function now()
  local clock = redis.call('TIME')
  return clock[1] * 1000 + math.floor(clock[2] / 1000)
end
