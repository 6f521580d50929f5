-- KEYS services
-- ARGV
-- USES now
--
-- Answers the records of the services that are alive. Others are forgotten an hour after their deadline.
--
-- Repeated, it reads again.
local FORGOTTEN_AFTER_MS = 3600000
local alive, now_ms = {}, now()
local all = redis.call('HGETALL', services)
for i = 1, #all, 2 do
  local name, value = all[i], all[i + 1]
  local bar = string.find(value, '|', 1, true)
  local deadline = tonumber(string.sub(value, 1, bar - 1))
  if deadline > now_ms then
    alive[#alive + 1] = string.sub(value, bar + 1)
  elseif deadline + FORGOTTEN_AFTER_MS < now_ms then
    redis.call('HDEL', services, name)
  end
end
return alive
