-- KEYS beats tidied services identity lease launcher streams...
-- ARGV group name record alive_ms for_all kind digest
-- USES now show
--
-- Keeps a consumer alive for alive_ms, and shows its service for as long, unless the record is empty. With for_all it
-- answers how many consumers have beaten: those that are alive, and dead ones that were not deleted yet; and once a
-- minute one such call deletes, for all workers, consumers that are dead and hold nothing: they never come back, since
-- names are new at every start; and the records of services whose deadline was an hour ago. The answer is the error
-- _STRANGER if the service may not be shown: then the consumer is not kept alive either.
--
-- Repeated, it sets the deadline again.
local TIDY_EVERY_MS = 60000
local FORGOTTEN_AFTER_MS = 3600000
local now_ms = now()

local function forget_services()
  local all = redis.call('HGETALL', services)
  for i = 1, #all, 2 do
    local deadline = string.match(all[i + 1], '^(%d+)|')
    if tonumber(deadline or '0') + FORGOTTEN_AFTER_MS < now_ms then redis.call('HDEL', services, all[i]) end
  end
end

local function tidy()
  local holds = {}
  for _, stream in ipairs(streams) do
    for _, other in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
      local consumer, pending = other[2], other[4]  -- {'name', n, 'pending', p, ...}
      if pending > 0 then
        holds[consumer] = true
      elseif tonumber(redis.call('HGET', beats, consumer) or '0') <= now_ms then
        redis.call('XGROUP', 'DELCONSUMER', stream, group, consumer)
      end
    end
  end
  local deadlines = redis.call('HGETALL', beats)
  for i = 1, #deadlines, 2 do
    local consumer = deadlines[i]
    if tonumber(deadlines[i + 1]) <= now_ms and not holds[consumer] then redis.call('HDEL', beats, consumer) end
  end
end

if record ~= '' and not show(now_ms) then return refused() end
redis.call('HSET', beats, name, string.format('%d', now_ms + alive_ms))
if for_all ~= '1' then return nil end
if redis.call('SET', tidied, '1', 'NX', 'PX', TIDY_EVERY_MS) then
  tidy()
  forget_services()
end
return redis.call('HLEN', beats)
