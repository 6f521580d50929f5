"""The Lua scripts: each is one atomic change of a run's state in Redis.

Owns every multi-key change. Invariant: after each script a ticket that is outstanding is in exactly one place, the one
that `live` names. Within a script the first write is the one that a full Redis refuses (XADD), so that the script
then changes nothing. No script is given the bytes of a part: they would be hashed and copied on their way into Lua, and
copied again on their way out. Entries hold: t ticket key, a attempt, p payload, n name of its parts, x why there is no
payload.
"""

# TIME in a script that writes is allowed since Redis 5 (effects are replicated).
_NOW = """
local function now()
  local clock = redis.call('TIME')
  return clock[1] * 1000 + math.floor(clock[2] / 1000)
end
"""

# The wake-up stream only says that something is new; one entry is enough.
WAKE = """
local function wake(key) redis.call('XADD', key, 'MAXLEN', '1', '*', 'w', '1') end
"""

# take(k, a) gives this consumer entries of the first stream that has any; the streams are KEYS[k + 4] and later.
# KEYS[k] beats, policy, failures, deaths, stream..., wake of each stream...
# ARGV group, consumer, ... ; ARGV[a] served version, its lease (-1: not checked), idle ms, take over all (1: for the
# holder of the trainer's lease), most entries
# -> {{place of the stream from 0, entry, fields, failures, deaths}...}, and where that is empty since nothing is there:
# what each wake-up stream ended with then, so that a reader who waits from there misses nothing and wakes for news only
_TAKE = (
    _NOW
    + """
local function give(stream, id)
  local claimed = redis.call('XCLAIM', stream, ARGV[1], ARGV[2], 0, id)
  if #claimed == 0 or not claimed[1] then
    redis.call('XACK', stream, ARGV[1], id)
    return nil
  end
  return claimed[1]
end

local function expired(stream, beats, idle_ms, take_over, limit)
  local found, others = {}, {}
  local function look(...)
    for _, waiting in ipairs(redis.call('XPENDING', stream, ARGV[1], ...)) do
      found[#found + 1] = give(stream, waiting[1])
    end
  end
  local holders = redis.call('XPENDING', stream, ARGV[1])[4]
  if not holders then return found end
  for _, holder in ipairs(holders) do
    if holder[1] ~= ARGV[2] then others[#others + 1] = holder[1] end
  end
  if #others > 0 then
    local deadlines, now_ms = redis.call('HMGET', beats, unpack(others)), now()
    for i, name in ipairs(others) do
      local is_dead = take_over or tonumber(deadlines[i] or '0') <= now_ms
      if is_dead and #found < limit then look('-', '+', limit - #found, name) end
    end
  end
  -- Of the living, and mine: not renewed, so that the answer that gave it away was lost on a broken connection.
  if #found < limit then look('IDLE', idle_ms, '-', '+', limit - #found) end
  return found
end

local function entries_of(stream, k, a)
  local limit = tonumber(ARGV[a + 4])
  local found = expired(stream, KEYS[k], ARGV[a + 2], ARGV[a + 3] == '1', limit)
  if #found < limit then
    local read = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', limit - #found, 'STREAMS', stream, '>')
    for _, entry in ipairs(read and read[1] and read[1][2] or {}) do found[#found + 1] = entry end
  end
  return found
end

local function described(entry, place, k, has_counts)
  if not has_counts then return {place, entry[1], entry[2], 0, 0} end
  local ticket = ''
  for j = 1, #entry[2], 2 do
    if entry[2][j] == 't' then ticket = entry[2][j + 1] end
  end
  return {place, entry[1], entry[2], tonumber(redis.call('HGET', KEYS[k + 2], ticket) or '0'),
    tonumber(redis.call('HGET', KEYS[k + 3], ticket) or '0')}
end

local function take(k, a)
  local number, lease = tonumber(ARGV[a]), tonumber(ARGV[a + 1])
  if number >= 0 then
    local announced = redis.call('HMGET', KEYS[k + 1], 'number', 'lease')
    if number < tonumber(announced[1] or '-1') or lease < tonumber(announced[2] or '-1') then return {{}, {}} end
  end
  local num_streams = (#KEYS - k - 3) / 2
  for place = 0, num_streams - 1 do
    local found = entries_of(KEYS[k + 4 + place], k, a)
    if #found > 0 then
      local has_counts = redis.call('EXISTS', KEYS[k + 2], KEYS[k + 3]) > 0
      for i, entry in ipairs(found) do found[i] = described(entry, place, k, has_counts) end
      return {found, {}}
    end
  end
  local ends = {}
  for i = 1, num_streams do
    local last = redis.call('XREVRANGE', KEYS[k + 3 + num_streams + i], '+', '-', 'COUNT', '1')
    ends[i] = last[1] and last[1][1] or '0-0'
  end
  return {{}, ends}
end
"""
)

# KEYS and ARGV of take: k = 1, a = 3 -> what it gives
TAKE = _TAKE + "return take(1, 3)\n"

# True when the entry is pending for this consumer: XACK alone does not check the owner.
_MINE = """
local function mine(stream, group, id, consumer)
  return #redis.call('XPENDING', stream, group, id, id, '1', consumer) > 0
end
"""

# Evaluation tickets are not outstanding work and have no place in live; a trained ticket stays so, whatever happens to
# a second message of it.
_PLACE = """
local function place(live, ticket, where)
  local was = redis.call('HGET', live, ticket)
  if was and string.sub(was, 1, 10) ~= 'committed|' then redis.call('HSET', live, ticket, where) end
end
"""

# One script: who is killed after it has handed over and holds the next, not between them. A script that is repeated
# because its first answer was lost finds that the entry is not ours, and must leave the parts to the successor.
# KEYS source, target, live, wake of target, both parts, then those of take (k = 7), without a stream where nothing is
#      to be taken
# ARGV group, consumer, entry, ticket, attempt, target stage, payload, name of the parts, new parts 0|1, texts are
#      unread 0|1, then those of take (a = 11)
# -> {1, or 0 when the entry was no longer ours, or 2 when a new part is not there, what take gives}
HAND_OVER = (
    _MINE
    + _PLACE
    + WAKE
    + _TAKE
    + """
if not mine(KEYS[1], ARGV[1], ARGV[3], ARGV[2]) then return {0, take(7, 11)} end
if ARGV[9] == '1' and redis.call('EXISTS', KEYS[5], KEYS[6]) < 2 then return {2, {{}, {}}} end
local id = redis.call('XADD', KEYS[2], '*', 't', ARGV[4], 'a', ARGV[5], 'p', ARGV[7], 'n', ARGV[8])
if ARGV[9] == '1' then
  redis.call('PERSIST', KEYS[5])
  redis.call('PERSIST', KEYS[6])
end
if ARGV[10] == '1' then redis.call('UNLINK', KEYS[6]) end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
place(KEYS[3], ARGV[4], ARGV[6] .. '|' .. id .. '|' .. ARGV[5])
wake(KEYS[4])
return {1, take(7, 11)}
"""
)

# Moves an entry to `dead` and tells the trainer with an entry without payload in `scored`.
# Needs: KEYS[1] source, dead, scored, live, wake of scored as given.
_BURY = (
    _PLACE
    + WAKE
    + """
local function bury(source, dead, scored, live, waker, group, id, ticket, attempt, reason, stage, payload, name)
  local fields = {'t', ticket, 'a', attempt, 'x', reason, 's', stage, 'p', payload}
  if name ~= '' then fields[11], fields[12] = 'n', name end
  local grave = redis.call('XADD', dead, '*', unpack(fields))
  if ticket ~= '' and source ~= scored then
    local note = redis.call('XADD', scored, '*', 't', ticket, 'a', attempt, 'x', reason)
    place(live, ticket, 'scored|' .. note .. '|' .. attempt)
    wake(waker)
  end
  redis.call('XACK', source, group, id)
  redis.call('XDEL', source, id)
  return grave
end
"""
)

# KEYS source, dead, scored, live, wake of scored
# ARGV group, consumer, entry, ticket, attempt, reason, source stage, payload, name of its parts  -> 1 | 0
BURY = (
    _MINE
    + _BURY
    + """
if not mine(KEYS[1], ARGV[1], ARGV[3], ARGV[2]) then return 0 end
bury(KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], ARGV[1], unpack(ARGV, 3))
return 1
"""
)

# Makes an entry free at once. The consumer name that it goes to never beats, so that the next take claims it.
# KEYS source, dead, scored, live, wake of scored, wake of source, failures, deaths
# ARGV group, consumer, entry, ticket, attempt, reason, source stage, payload, name of its parts, failed 0|1, died 0|1,
#      max deliveries, max deaths   -> 0 not ours, 1 free again, 2 buried as poison
GIVE_BACK = (
    _MINE
    + _BURY
    + """
if not mine(KEYS[1], ARGV[1], ARGV[3], ARGV[2]) then return 0 end
local function count(key, increment)
  if increment == '0' then return tonumber(redis.call('HGET', key, ARGV[4]) or '0') end
  return redis.call('HINCRBY', key, ARGV[4], increment)
end
local failures, deaths = count(KEYS[7], ARGV[10]), count(KEYS[8], ARGV[11])
if failures >= tonumber(ARGV[12]) or deaths >= tonumber(ARGV[13]) then
  bury(KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], ARGV[1], unpack(ARGV, 3, 9))
  return 2
end
redis.call('XCLAIM', KEYS[1], ARGV[1], 'released', '0', ARGV[3], 'JUSTID')
wake(KEYS[6])
return 1
"""
)

# Also forgets consumers that are dead and hold nothing: they never come back, since names are new at every start.
# KEYS beats, streams ; ARGV group, consumer, alive for ms
BEAT = (
    _NOW
    + """
local now_ms = now()
redis.call('HSET', KEYS[1], ARGV[2], string.format('%d', now_ms + ARGV[3]))
for i = 2, #KEYS do
  for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[i], ARGV[1])) do
    local name, pending = consumer[2], consumer[4]  -- {'name', n, 'pending', p, ...}
    if pending == 0 and tonumber(redis.call('HGET', KEYS[1], name) or '0') <= now_ms then
      redis.call('XGROUP', 'DELCONSUMER', KEYS[i], ARGV[1], name)
    end
  end
end
return 1
"""
)

# Resets the idle time of entries that are still held by this consumer.
# KEYS stream ; ARGV group, consumer, entry...
RENEW = (
    _MINE
    + """
for i = 3, #ARGV do
  if mine(KEYS[1], ARGV[1], ARGV[i], ARGV[2]) then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], '0', ARGV[i], 'JUSTID')
  end
end
return 1
"""
)

# KEYS services ; ARGV name, record, alive for ms
REGISTER = (
    _NOW
    + """
redis.call('HSET', KEYS[1], ARGV[1], string.format('%d', now() + ARGV[3]) .. '|' .. ARGV[2])
return 1
"""
)

# KEYS services -> records that are alive; the others are forgotten after an hour
SERVICES = (
    _NOW
    + """
local alive, now_ms = {}, now()
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local bar = string.find(all[i + 1], '|', 1, true)
  local deadline = tonumber(string.sub(all[i + 1], 1, bar - 1))
  if deadline > now_ms then
    alive[#alive + 1] = string.sub(all[i + 1], bar + 1)
  elseif deadline + 3600000 < now_ms then
    redis.call('HDEL', KEYS[1], all[i])
  end
end
return alive
"""
)
