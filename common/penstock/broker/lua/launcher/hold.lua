-- KEYS identity lease launcher ledger services
-- ARGV token alive_ms kind digest rollout_digest agent_digest reward_digest settings folder next_folder words place existing
-- USES own
--
-- Lets a launcher hold the run for alive_ms, and writes whose the run is. It has locked the run's folder, so that an
-- earlier launcher of that folder on this host is dead. `existing` is run.existing.
-- Answers {own, the id of the run's folder}, or why not:
--   held       another launcher holds the run, or a trainer that this launch must not meet: of another configuration or
--              folder, or any trainer or service if its run is to be replaced, since its trainer may be starting. Until
--              when they do follows, the last shown service at the end. They may be dead: then nobody renews
--   elsewhere  nobody holds it, and its state is in another folder, or run.existing is refuse
--
-- Repeated, it holds the run again: the launcher is of this folder on this host.
local is_another = is_stranger or elsewhere

local function last_shown()
  local last = 0
  for _, value in ipairs(redis.call('HVALS', services)) do
    local shown_until, of_kind, of_digest = string.match(value, '^(%d+)|(%a+)|(%x+)|')
    local is_own = shown_until and redis.call('HGET', identity, of_kind) == of_digest
    if is_own then last = math.max(last, tonumber(shown_until)) end
  end
  return last > now() and last or 0
end

local function held_or_shown()
  local answer = held()
  answer[#answer + 1] = last_shown()
  return answer
end

if redis.call('EXISTS', launcher) == 1 and redis.call('HGET', identity, 'place') ~= place then return held_or_shown() end
if redis.call('EXISTS', lease) == 1 and (is_another or existing == 'replace') then return held_or_shown() end
if existing == 'replace' and last_shown() > 0 then return held_or_shown() end
local has_run = redis.call('EXISTS', ledger) == 1
if has_run and (existing == 'refuse' or (existing == 'resume' and elsewhere)) then return {'elsewhere'} end
local id = existing == 'replace' and own(next_folder) or own(this_folder())
redis.call('SET', launcher, token, 'PX', alive_ms)
return {'own', id}
