-- RELEASED: the consumer for which an entry is pending that nobody holds any more. It never beats.
-- release(stream, ids): makes entries free. has_free(stream): whether there is an entry that nobody holds.
-- Needs: group.
local RELEASED = 'released'

local function release(stream, ids)
  local arguments = {}
  for i, id in ipairs(ids) do arguments[i] = id end
  arguments[#arguments + 1] = 'JUSTID'
  redis.call('XCLAIM', stream, group, RELEASED, '0', unpack(arguments))
end

local function has_free(stream)
  local length = redis.call('XLEN', stream)
  if length == 0 then return false end
  if #redis.call('XPENDING', stream, group, '-', '+', '1', RELEASED) > 0 then return true end
  local facts = redis.call('XINFO', 'GROUPS', stream)[1] or {}
  for i = 1, #facts, 2 do
    if facts[i] == 'pending' then return length > facts[i + 1] end
  end
  return false
end
