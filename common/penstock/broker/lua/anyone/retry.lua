-- KEYS dead live failures deaths lease stages(stream waiting)...
-- ARGV group letter stage_names...
-- USES wake
--
-- Sends a dead letter to the stage that it came from, if its ticket allows it (the table in dead.py).
-- stage_names are in the order of `stages`. Answers {'sent' or why not, detail}.
--
-- Repeated, it answers gone: a letter that was sent is no longer in `dead`.
local found = redis.call('XRANGE', dead, letter, letter)
if #found == 0 then return {'gone', ''} end

local function fields_of(entry)
  local fields = {}
  for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
  return fields
end

local function stage_of(name)
  for i, each in ipairs(stage_names) do
    if each == name then return stages[i] end
  end
end

local fields = fields_of(found[1])
local ticket, attempt, stage_name = fields.t or '', fields.a or '0', fields.s or ''
local stage = stage_of(stage_name)
if not stage then return {'stage', stage_name} end
if string.match(ticket, '^e%d+$') then return {'evaluation', ''} end

local is_ticket = string.match(ticket, '^%d+$')
local note_stream, note
if is_ticket then
  local place = redis.call('HGET', live, ticket)
  if not place then return {'ended', ''} end
  local at, entry, last = string.match(place, '^([^|]*)|([^|]*)|(.*)$')
  if at == 'committed' then return {'committed', ''} end
  note_stream = stage_of(at).stream
  local there = redis.call('XRANGE', note_stream, entry, entry)
  if #there > 0 then
    note = entry
    if fields_of(there[1]).p then return {'elsewhere', at} end
    local is_held = #redis.call('XPENDING', note_stream, group, note, note, '1') > 0
    if is_held and redis.call('EXISTS', lease) == 1 then return {'held', ''} end
  end
  attempt = string.format('%d', math.max(tonumber(attempt) or 0, tonumber(last) or 0))
end

local again = {'t', ticket, 'a', attempt, 'p', fields.p or ''}
if fields.n then again[7], again[8] = 'n', fields.n end
local id = redis.call('XADD', stage.stream, '*', unpack(again))
if is_ticket then
  redis.call('HSET', live, ticket, stage_name .. '|' .. id .. '|' .. attempt)
  redis.call('HDEL', failures, ticket)
  redis.call('HDEL', deaths, ticket)
  if note then
    redis.call('XACK', note_stream, group, note)
    redis.call('XDEL', note_stream, note)
  end
end
redis.call('XDEL', dead, letter)
wake(stage.waiting, 1)
return {'sent', stage_name}
