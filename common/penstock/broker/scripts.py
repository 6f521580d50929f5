"""The Lua scripts: each is one atomic change of a run's state in Redis.

Owns every multi-key change. Invariant: after each script a ticket that is outstanding is in exactly one place, the one
that `live` names. Within a script the first write is the one that a full Redis refuses (XADD), so that the script
then changes nothing. Entries hold: t ticket key, a attempt, p payload, x why there is no payload. Called by
`queue.py` and `worker.py`; the trainer's own scripts are in `trainer_scripts.py`.
"""

# Sets now_ms. TIME in a script that writes is allowed since Redis 5 (effects are replicated).
_NOW = """
local clock = redis.call('TIME')
local now_ms = clock[1] * 1000 + math.floor(clock[2] / 1000)
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

local function is_dead(name, deadline, take_over)
  return name ~= ARGV[2] and (take_over or tonumber(deadline or '0') <= now_ms)
end

local function expired(stream, beats, idle_ms, take_over, limit)
  local found, names = {}, {}
  local function look(...)
    for _, waiting in ipairs(redis.call('XPENDING', stream, ARGV[1], ...)) do
      found[#found + 1] = give(stream, waiting[1])
    end
  end
  for _, holder in ipairs(redis.call('XPENDING', stream, ARGV[1])[4] or {}) do names[#names + 1] = holder[1] end
  if #names == 0 then return found end
  local deadlines = redis.call('HMGET', beats, unpack(names))
  for i, name in ipairs(names) do
    if #found < limit and is_dead(name, deadlines[i], take_over) then look('-', '+', limit - #found, name) end
  end
  -- Of the living, and mine: not renewed, so that the answer that gave it away was lost on a broken connection.
  if #found < limit then look('IDLE', idle_ms, '-', '+', limit - #found) end
  return found
end

-- A consumer that is dead and holds nothing never comes back: names are new at every start.
local function forget_dead(stream, beats, take_over)
  for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', stream, ARGV[1])) do
    local name, pending = consumer[2], consumer[4]  -- {'name', n, 'pending', p, ...}
    if pending == 0 and is_dead(name, redis.call('HGET', beats, name), take_over) then
      redis.call('XGROUP', 'DELCONSUMER', stream, ARGV[1], name)
    end
  end
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

local function described(entry, place, k)
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
    for i, entry in ipairs(found) do found[i] = described(entry, place, k) end
    if #found > 0 then return {found, {}} end
  end
  local ends = {}
  for i = 1, num_streams do
    forget_dead(KEYS[k + 3 + i], KEYS[k], ARGV[a + 3] == '1')
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

# One script: who is killed after it has handed over and holds the next, not between them.
# KEYS source, target, live, wake of target, then those of take (k = 5), without a stream where nothing is to be taken
# ARGV group, consumer, entry, ticket, attempt, target stage, payload, then those of take (a = 8)
# -> {1, or 0 when the entry was no longer ours, what take gives}
HAND_OVER = (
    _MINE
    + WAKE
    + _TAKE
    + """
if not mine(KEYS[1], ARGV[1], ARGV[3], ARGV[2]) then return {0, take(5, 8)} end
local id = redis.call('XADD', KEYS[2], '*', 't', ARGV[4], 'a', ARGV[5], 'p', ARGV[7])
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
-- Evaluation tickets are not outstanding work and have no place in live.
if redis.call('HEXISTS', KEYS[3], ARGV[4]) == 1 then
  redis.call('HSET', KEYS[3], ARGV[4], ARGV[6] .. '|' .. id .. '|' .. ARGV[5])
end
wake(KEYS[4])
return {1, take(5, 8)}
"""
)

# Moves an entry to `dead` and tells the trainer with an entry without payload in `scored`.
# Needs: KEYS[1] source, dead, scored, live, wake of scored as given.
_BURY = (
    WAKE
    + """
local function bury(source, dead, scored, live, waker, group, id, ticket, attempt, reason, stage, payload)
  local grave = redis.call('XADD', dead, '*', 't', ticket, 'a', attempt, 'x', reason, 's', stage, 'p', payload)
  if ticket ~= '' and source ~= scored then
    local note = redis.call('XADD', scored, '*', 't', ticket, 'a', attempt, 'x', reason)
    if redis.call('HEXISTS', live, ticket) == 1 then
      redis.call('HSET', live, ticket, 'scored|' .. note .. '|' .. attempt)
    end
    wake(waker)
  end
  redis.call('XACK', source, group, id)
  redis.call('XDEL', source, id)
  return grave
end
"""
)

# KEYS source, dead, scored, live, wake of scored
# ARGV group, consumer, entry, ticket, attempt, reason, source stage, payload  -> 1 | 0
BURY = (
    _MINE
    + _BURY
    + """
if not mine(KEYS[1], ARGV[1], ARGV[3], ARGV[2]) then return 0 end
bury(KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], ARGV[1], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8])
return 1
"""
)

# Makes an entry free at once. The consumer name that it goes to never beats, so that the next take claims it.
# KEYS source, dead, scored, live, wake of scored, wake of source, failures, deaths
# ARGV group, consumer, entry, ticket, attempt, reason, source stage, payload, failed 0|1, died 0|1, max deliveries,
#      max deaths   -> 0 not ours, 1 free again, 2 buried as poison
GIVE_BACK = (
    _MINE
    + _BURY
    + """
if not mine(KEYS[1], ARGV[1], ARGV[3], ARGV[2]) then return 0 end
local function count(key, increment)
  if increment == '0' then return tonumber(redis.call('HGET', key, ARGV[4]) or '0') end
  return redis.call('HINCRBY', key, ARGV[4], increment)
end
local failures, deaths = count(KEYS[7], ARGV[9]), count(KEYS[8], ARGV[10])
if failures >= tonumber(ARGV[11]) or deaths >= tonumber(ARGV[12]) then
  bury(KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], ARGV[1], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8])
  return 2
end
redis.call('XCLAIM', KEYS[1], ARGV[1], 'released', '0', ARGV[3], 'JUSTID')
wake(KEYS[6])
return 1
"""
)

# KEYS beats ; ARGV consumer, alive for ms
BEAT = (
    _NOW
    + """
redis.call('HSET', KEYS[1], ARGV[1], string.format('%d', now_ms + ARGV[2]))
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
redis.call('HSET', KEYS[1], ARGV[1], string.format('%d', now_ms + ARGV[3]) .. '|' .. ARGV[2])
return 1
"""
)

# KEYS services -> records that are alive; the others are forgotten after an hour
SERVICES = (
    _NOW
    + """
local alive = {}
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
