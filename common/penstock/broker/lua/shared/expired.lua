-- USES now released
--
-- release_expired(stage): makes the entries free whose holder is dead, and those that were not renewed: the answer with
-- them was lost with a connection. One call looks for all workers, since it costs as much as there are holders and held
-- entries: a call within LOOK_EVERY_MS of the last one does nothing, or within 1 ms for each holder if that is longer.
-- Needs: group, consumer, beats, idle_ms, take_over (see take.lua).
local LOOK_EVERY_MS = 250
local MOST_RELEASED = 1000  -- of one holder in one look; further ones with the next call

local function is_due(stage)
  -- An error: a full Redis refuses SET. Then each call looks.
  return redis.pcall('SET', stage.looked, '1', 'NX', 'PX', LOOK_EVERY_MS) ~= false
end

local function release_expired(stage)
  local is_cut = false
  local function release_pending(...)
    local waiting, ids = redis.call('XPENDING', stage.stream, group, ...), {}
    for _, each in ipairs(waiting) do
      if each[2] ~= RELEASED then ids[#ids + 1] = each[1] end
    end
    if #ids > 0 then release(stage.stream, ids) end
    is_cut = is_cut or #waiting == MOST_RELEASED
  end

  if not is_due(stage) then return end
  local holders = redis.call('XPENDING', stage.stream, group)[4]
  if not holders then return end
  local others = {}
  for _, holder in ipairs(holders) do
    if holder[1] ~= consumer and holder[1] ~= RELEASED then others[#others + 1] = holder[1] end
  end
  local now_ms = now()
  if #others > LOOK_EVERY_MS then redis.pcall('PEXPIRE', stage.looked, #others) end
  for _, name in ipairs(others) do
    local is_dead = take_over == '1' or tonumber(redis.call('HGET', beats, name) or '0') <= now_ms
    if is_dead then release_pending('-', '+', MOST_RELEASED, name) end
  end
  release_pending('IDLE', idle_ms, '-', '+', MOST_RELEASED)
  if is_cut then redis.call('DEL', stage.looked) end
end
