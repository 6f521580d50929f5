-- KEYS lease last_number
-- ARGV random_id alive_ms above
--
-- Takes the lease if nobody holds it, under a number higher than `above` and than every one given out before.
-- Answers {token}, or {} while another holds it.
--
-- Repeated because its answer was lost, it answers {} until the lease that nobody renews has expired.
if redis.call('EXISTS', lease) == 1 then return {} end
local number = math.max(tonumber(redis.call('GET', last_number) or '0'), tonumber(above)) + 1
redis.call('SET', last_number, number)
local token = string.format('%d', number) .. ':' .. random_id
redis.call('SET', lease, token, 'PX', alive_ms)
return {token}
