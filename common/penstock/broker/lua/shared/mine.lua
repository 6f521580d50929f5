-- mine(stream, id): whether an entry is pending for this consumer. XACK alone does not check the owner.
-- Needs: group, consumer.
local function mine(stream, id)
  return #redis.call('XPENDING', stream, group, id, id, '1', consumer) > 0
end
