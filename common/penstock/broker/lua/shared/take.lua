-- USES stranger released expired wake
--
-- take(): gives this consumer entries of the first stage that has any, those that were released first.
-- It answers {{place of the stage from 0, entry, fields, failures, deaths}...}, or false if this consumer may take
-- nothing: a stranger, and a server that is behind the announced version, or before one is announced; then whether
-- free entries are left for which nobody was woken.
-- Needs: group, consumer, beats, policy, failures, deaths, stages(stream waiting looked)...,
--   served_number, served_digest, served_lease: the version that this server serves, -1 if it does not matter
--   idle_ms: an entry that was not renewed for so long is free
--   take_over: 1 for the holder of the trainer's lease, who also takes entries of living holders
--   limit: most entries

local function claim(stream, id)
  local claimed = redis.call('XCLAIM', stream, group, consumer, 0, id)
  if #claimed == 0 or not claimed[1] then
    redis.call('XACK', stream, group, id)
    return nil
  end
  return claimed[1]
end

local function entries_of(stage)
  local found, most = {}, tonumber(limit)
  release_expired(stage)
  for _, free in ipairs(redis.call('XPENDING', stage.stream, group, '-', '+', most, RELEASED)) do
    found[#found + 1] = claim(stage.stream, free[1])
  end
  if #found < most then
    local read = redis.call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', most - #found, 'STREAMS', stage.stream, '>')
    for _, new in ipairs(read and read[1] and read[1][2] or {}) do found[#found + 1] = new end
  end
  return found
end

-- Nobody sleeps while an entry is free: it has woken somebody, who takes it or wakes another here.
local function pass_on()
  local is_left_to_nobody = false
  for _, stage in ipairs(stages) do
    if has_free(stage.stream) and wake(stage.waiting, 1) == 0 then is_left_to_nobody = true end
  end
  return is_left_to_nobody
end

local function described(found, place, has_counts)
  local id, fields = found[1], found[2]
  if not has_counts then return {place, id, fields, 0, 0} end
  local key = ''
  for i = 1, #fields, 2 do
    if fields[i] == 't' then key = fields[i + 1] end
  end
  return {place, id, fields, tonumber(redis.call('HGET', failures, key) or '0'),
    tonumber(redis.call('HGET', deaths, key) or '0')}
end

local function is_behind()
  local number, lease_number = tonumber(served_number), tonumber(served_lease)
  if number < 0 then return false end
  local announced = redis.call('HMGET', policy, 'number', 'lease', 'digest')
  if not announced[1] then return true end
  local last_number, last_lease = tonumber(announced[1]), tonumber(announced[2])
  local is_other = number == last_number and lease_number == last_lease and served_digest ~= announced[3]
  return number < last_number or lease_number < last_lease or is_other
end

local function take()
  if is_stranger or is_behind() then
    return false, pass_on()
  end
  for i, stage in ipairs(stages) do
    local found = redis.call('XLEN', stage.stream) > 0 and entries_of(stage) or {}
    if #found > 0 then
      local has_counts = redis.call('EXISTS', failures, deaths) > 0
      for j, each in ipairs(found) do found[j] = described(each, i - 1, has_counts) end
      return found, pass_on()
    end
  end
  return {}, false
end
