-- KEYS services identity lease launcher
-- ARGV name record alive_ms kind digest
-- USES now stranger live
--
-- Shows a service to the others for alive_ms, beside its kind and the digest of its configuration. Answers 1, or the
-- error _STRANGER if the run lives and is of another configuration: then it is not shown any more.
--
-- Repeated, it writes the record again, with a later deadline.
if is_stranger and is_live() then
  redis.call('HDEL', services, name)
  return refused()
end
local shown_until = string.format('%d', now() + alive_ms)
redis.call('HSET', services, name, shown_until .. '|' .. kind .. '|' .. digest .. '|' .. record)
return 1
