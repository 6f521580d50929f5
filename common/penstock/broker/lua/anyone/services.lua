-- KEYS services identity
-- ARGV
-- USES now
--
-- Answers the records of the services that are alive and of the run's configuration. Others are forgotten an hour after
-- their deadline.
--
-- Repeated, it reads again.
local FORGOTTEN_AFTER_MS = 3600000
local alive, now_ms = {}, now()
local all = redis.call('HGETALL', services)
for i = 1, #all, 2 do
  local name, value = all[i], all[i + 1]
  local deadline, kind, digest, record = string.match(value, '^(%d+)|(%a+)|(%x+)|(.*)$')
  if tonumber(deadline or '0') > now_ms then
    local known_digest = redis.call('HGET', identity, kind)
    if not known_digest or digest == known_digest then alive[#alive + 1] = record end
  elseif tonumber(deadline or '0') + FORGOTTEN_AFTER_MS < now_ms then
    redis.call('HDEL', services, name)
  end
end
return alive
