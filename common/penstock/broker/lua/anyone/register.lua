-- KEYS services
-- ARGV name record alive_ms
-- USES now
--
-- Shows a service to the others for alive_ms. Answers 1.
--
-- Repeated, it writes the record again, with a later deadline.
redis.call('HSET', services, name, string.format('%d', now() + alive_ms) .. '|' .. record)
return 1
