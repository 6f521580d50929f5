-- KEYS beats streams...
-- ARGV group consumer alive_ms
-- USES now
--
-- Keeps a consumer alive for alive_ms. It also deletes consumers that are dead and hold nothing: they never come back,
-- since names are new at every start. Answers 1.
--
-- Repeated, it sets the deadline again.
local now_ms = now()
redis.call('HSET', beats, consumer, string.format('%d', now_ms + alive_ms))
for _, stream in ipairs(streams) do
  for _, other in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
    local name, pending = other[2], other[4]  -- {'name', n, 'pending', p, ...}
    if pending == 0 and tonumber(redis.call('HGET', beats, name) or '0') <= now_ms then
      redis.call('XGROUP', 'DELCONSUMER', stream, group, name)
    end
  end
end
return 1
