-- KEYS lease last_number identity launcher ledger
-- ARGV random_id alive_ms above kind digest rollout_digest agent_digest reward_digest settings folder next_folder words place
-- USES own
--
-- Takes the lease if nobody holds it, under a number higher than `above` and than every one given out before. If no
-- launcher holds the run, or nobody has written it, it also writes whose the run is from now on.
-- Answers {leased, token, the id of the run's folder}, or why not:
--   held       another trainer holds it
--   another    as held, and the run is of another configuration or folder; or a launcher holds such a run
--   elsewhere  nobody holds the run, and its state is in another folder
--
-- Repeated because its answer was lost, it answers held until the lease that nobody renews has expired.
local is_another = is_stranger or elsewhere
local has_launcher = redis.call('EXISTS', launcher) == 1
if redis.call('EXISTS', lease) == 1 or (has_launcher and is_another) then
  local answer = held()
  if is_another then answer[1] = 'another' end
  return answer
end
if elsewhere and redis.call('EXISTS', ledger) == 1 then return {'elsewhere'} end
local number = math.max(tonumber(redis.call('GET', last_number) or '0'), tonumber(above)) + 1
redis.call('SET', last_number, number)
local id = this_folder()
if not has_launcher or not known_digest then own(id) end
local token = string.format('%d', number) .. ':' .. random_id
redis.call('SET', lease, token, 'PX', alive_ms)
return {'leased', token, id}
