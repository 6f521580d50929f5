-- KEYS beats policy failures deaths identity lease launcher stages(stream wake looked)...
-- ARGV group consumer kind digest served_number served_lease idle_ms take_over limit
-- USES take live
--
-- Gives a worker entries of the first stage that has any. The answer is that of take(), or the error _STRANGER if the
-- run lives and is of another configuration. While nobody holds such a run, its next owner may be of this worker's: it
-- waits.
--
-- Repeated because its answer was lost, it gives other entries, or none. The first ones are pending for this consumer,
-- which does not renew them, and are free again after idle_ms.
if is_stranger and is_live() then return refused() end
return take()
