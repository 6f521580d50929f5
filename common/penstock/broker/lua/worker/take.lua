-- KEYS beats policy failures deaths stages(stream wake)...
-- ARGV group consumer served_number served_lease idle_ms take_over limit
-- USES take
--
-- Gives a worker entries of the first stage that has any. The answer is that of take().
--
-- Repeated because its answer was lost, it gives other entries, or none. The first ones are pending for this consumer,
-- which does not renew them, and are free again after idle_ms.
return take()
