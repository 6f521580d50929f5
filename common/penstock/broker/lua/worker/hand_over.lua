-- KEYS source target live target_waiting completions texts teacher episodes
-- KEYS beats policy failures deaths identity stages(stream waiting looked)...
-- ARGV group consumer entry ticket attempt target_stage payload parts has_new_parts is_taught texts_unread
-- ARGV kind digest served_number served_digest served_lease idle_ms take_over limit
-- USES mine locate wake take
--
-- Replaces an entry by its successor in the next stage, and takes the next entry; `stages` are empty if none is wanted.
-- completions, texts and teacher are the parts of the group, `parts` is their name; the last one is there if it is_taught.
-- Texts that nobody will read are deleted, and so are the finished episodes of the entry: the group has them.
-- Answers {outcome, the first thing that take() answers}:
--   moved      the successor is in place
--   late       the entry was no longer this consumer's: nothing is published
--   no parts   a new part is not there: nothing has changed, and nothing is taken
-- or the error _STRANGER if the run has become one of another configuration: the result is not of that.
--
-- One script for both, so that a worker is never killed between them.
--
-- Repeated, it answers late: the entry is not this consumer's any more, and the parts are the successor's. The entry
-- that it took the first time is free again after idle_ms.
if is_stranger then return refused() end
if not mine(source, entry) then return {'late', (take())} end
if has_new_parts == '1' and redis.call('EXISTS', completions, texts) < 2 then return {'no parts', {}} end
if is_taught == '1' and redis.call('EXISTS', teacher) < 1 then return {'no parts', {}} end
local id = redis.call('XADD', target, '*', 't', ticket, 'a', attempt, 'p', payload, 'n', parts)
if has_new_parts == '1' then
  redis.call('PERSIST', completions)
  redis.call('PERSIST', texts)
end
if is_taught == '1' then redis.call('PERSIST', teacher) end
if texts_unread == '1' then redis.call('UNLINK', texts) end
redis.call('UNLINK', episodes)
redis.call('XACK', source, group, entry)
redis.call('XDEL', source, entry)
locate(target_stage .. '|' .. id .. '|' .. attempt)
wake(target_waiting, 1)
return {'moved', (take())}
