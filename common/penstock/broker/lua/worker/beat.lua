-- KEYS beats tidied streams...
-- ARGV group consumer alive_ms
-- USES now
--
-- Keeps a consumer alive for alive_ms. Once a minute it also deletes, for all workers, consumers that are dead and hold
-- nothing: they never come back, since names are new at every start. Answers how many consumers have beaten: those that
-- are alive, and dead ones that were not deleted yet.
--
-- Repeated, it sets the deadline again.
local TIDY_EVERY_MS = 60000
local now_ms = now()

local function tidy()
  local holds = {}
  for _, stream in ipairs(streams) do
    for _, other in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
      local name, pending = other[2], other[4]  -- {'name', n, 'pending', p, ...}
      if pending > 0 then
        holds[name] = true
      elseif tonumber(redis.call('HGET', beats, name) or '0') <= now_ms then
        redis.call('XGROUP', 'DELCONSUMER', stream, group, name)
      end
    end
  end
  local deadlines = redis.call('HGETALL', beats)
  for i = 1, #deadlines, 2 do
    local name = deadlines[i]
    if tonumber(deadlines[i + 1]) <= now_ms and not holds[name] then redis.call('HDEL', beats, name) end
  end
end

redis.call('HSET', beats, consumer, string.format('%d', now_ms + alive_ms))
if redis.call('SET', tidied, '1', 'NX', 'PX', TIDY_EVERY_MS) then tidy() end
return redis.call('HLEN', beats)
