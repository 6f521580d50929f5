-- USES now stranger
--
-- take(): gives this consumer entries of the first stage that has any, those of dead holders first.
-- It answers {{{place of the stage from 0, entry, fields, failures, deaths}...}, ends}. If there is nothing to take,
-- `ends` are the last entries of the wake-up streams at that moment: a reader who waits from there misses nothing.
-- A stranger gets nothing.
-- Needs: group, consumer, beats, policy, failures, deaths, stages(stream wake)...,
--   served_number, served_lease: the version that this server serves, -1 if it does not matter
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

local function claim_expired(stream, most)
  local found, others = {}, {}
  local function look(...)
    for _, waiting in ipairs(redis.call('XPENDING', stream, group, ...)) do
      found[#found + 1] = claim(stream, waiting[1])
    end
  end
  local holders = redis.call('XPENDING', stream, group)[4]
  if not holders then return found end
  for _, holder in ipairs(holders) do
    if holder[1] ~= consumer then others[#others + 1] = holder[1] end
  end
  if #others > 0 then
    local deadlines, now_ms = redis.call('HMGET', beats, unpack(others)), now()
    for i, name in ipairs(others) do
      local is_dead = take_over == '1' or tonumber(deadlines[i] or '0') <= now_ms
      if is_dead and #found < most then look('-', '+', most - #found, name) end
    end
  end
  -- Entries of living holders, mine included, that were not renewed: the answer with them was lost with a connection.
  if #found < most then look('IDLE', idle_ms, '-', '+', most - #found) end
  return found
end

local function entries_of(stream)
  local most = tonumber(limit)
  local found = claim_expired(stream, most)
  if #found < most then
    local read = redis.call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', most - #found, 'STREAMS', stream, '>')
    for _, new in ipairs(read and read[1] and read[1][2] or {}) do found[#found + 1] = new end
  end
  return found
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

local function take()
  local number, lease_number = tonumber(served_number), tonumber(served_lease)
  if number >= 0 then
    local announced = redis.call('HMGET', policy, 'number', 'lease')
    if number < tonumber(announced[1] or '-1') or lease_number < tonumber(announced[2] or '-1') then return {{}, {}} end
  end
  for i, stage in ipairs(is_stranger and {} or stages) do
    local found = entries_of(stage.stream)
    if #found > 0 then
      local has_counts = redis.call('EXISTS', failures, deaths) > 0
      for j, each in ipairs(found) do found[j] = described(each, i - 1, has_counts) end
      return {found, {}}
    end
  end
  local ends = {}
  for i, stage in ipairs(stages) do
    local last = redis.call('XREVRANGE', stage.wake, '+', '-', 'COUNT', '1')
    ends[i] = last[1] and last[1][1] or '0-0'
  end
  return {{}, ends}
end
