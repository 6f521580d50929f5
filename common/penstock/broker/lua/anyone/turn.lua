-- KEYS lease turn
-- ARGV
--
-- Answers the lease's number and the turn's number while the trainer that holds the lease has the turn on the GPUs;
-- otherwise nothing: then it is the engines' turn. A trainer that died has none once its lease has expired.
--
-- Repeated, it reads again.
local value = redis.call('GET', turn)
local token, number = string.match(value or '', '^(.*)/(%d+)$')
if not token or redis.call('GET', lease) ~= token then return false end
return {tonumber(string.match(token, '^%d+')), tonumber(number)}
