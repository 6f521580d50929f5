-- KEYS beats policy failures deaths identity lease launcher woken stages(stream waiting looked)...
-- ARGV group consumer kind digest served_number served_digest served_lease idle_ms take_over limit has_room waits_ms
-- USES take live now
--
-- Gives a worker entries of the first stage that has any. Answers {what take() answers, whether the worker waits}, or
-- the error _STRANGER if the run lives and is of another configuration. While nobody holds such a run, its next owner may
-- be of this worker's: it waits. A worker that finds nothing is woken by the next entry, at its list `woken`, for
-- waits_ms. So is one that has_room for more, unless entries are left and nobody else waits for them: all that wait get
-- one before any of them gets two.
--
-- Repeated because its answer was lost, it gives other entries, or none. The first ones are pending for this consumer,
-- which does not renew them, and are free again after idle_ms.
if is_stranger and is_live() then return refused() end
for _, stage in ipairs(stages) do redis.call('ZREM', stage.waiting, consumer) end
redis.call('DEL', woken)
local taken, is_left_to_nobody = take()
local waits = taken and (#taken == 0 or (has_room == '1' and not is_left_to_nobody))
if waits then
  local until_ms = string.format('%d', now() + waits_ms)
  for _, stage in ipairs(stages) do redis.pcall('ZADD', stage.waiting, until_ms, consumer) end  -- a full Redis refuses it
end
return {taken, waits and 1 or 0}
