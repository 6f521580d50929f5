"""The Lua scripts that only the trainer runs: each is fenced by its lease and is one atomic change.

Owns the commit point, announcing and issuing. Invariant: a script of a trainer that no longer holds the lease changes
nothing and answers _FENCED; a script that is repeated after a broken connection has its effect once.
"""

from penstock.broker.scripts import WAKE

# Refuses the script unless this trainer holds the lease. KEYS[1] lease, ARGV[1] token.
_HOLDER = """
local function number_of(token) return tonumber(string.match(token, '^%d+')) end
local holder = redis.call('GET', KEYS[1])
-- Numbers only grow: a lower one comes back only where the queue has lost its last writes.
if holder and number_of(holder) < number_of(ARGV[1]) then holder = false end
"""
_REFUSE = """
if holder ~= ARGV[1] then
  return redis.error_reply('_FENCED ' .. (holder or 'nobody'))
end
"""
_FENCE = _HOLDER + _REFUSE

# KEYS lease, last ; ARGV random id, ms, number that it must be above -> token | {} while another holds it
ACQUIRE_LEASE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return {} end
local number = math.max(tonumber(redis.call('GET', KEYS[2]) or '0'), tonumber(ARGV[3])) + 1
redis.call('SET', KEYS[2], number)
local token = string.format('%d', number) .. ':' .. ARGV[1]
redis.call('SET', KEYS[1], token, 'PX', ARGV[2])
return {token}
"""

# A lease that expired while its holder was frozen, or the queue away, is held again if nobody has had it since.
# KEYS lease, last ; ARGV token, ms
RENEW_LEASE = (
    _HOLDER
    + """
if not holder and redis.call('GET', KEYS[2]) == string.match(ARGV[1], '^%d+') then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  return 1
end
"""
    + _REFUSE
    + "redis.call('PEXPIRE', KEYS[1], ARGV[2])\nreturn 1\n"
)

# KEYS lease ; ARGV token
RELEASE_LEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end\nreturn 0\n"

# Issues tickets, and first announces a version and lets go of the tickets it includes, where they are given.
# KEYS lease, policy, live, counters, tickets, wake of tickets, failures, deaths
# ARGV token, number or empty, digest, path, lease number, canary, count of resolved, resolved...,
#      then (ticket, attempt, payload)...
ANNOUNCE = (
    _FENCE
    + WAKE
    + """
local num_resolved = tonumber(ARGV[7])
local next_number = tonumber(redis.call('HGET', KEYS[4], 'next') or '0')
for i = 8 + num_resolved, #ARGV, 3 do
  -- A call that is repeated after a broken connection issues nothing twice.
  local place = redis.call('HGET', KEYS[3], ARGV[i])
  if not place or string.match(place, '[^|]*$') ~= ARGV[i + 1] then
    local id = redis.call('XADD', KEYS[5], '*', 't', ARGV[i], 'a', ARGV[i + 1], 'p', ARGV[i + 2])
    redis.call('HSET', KEYS[3], ARGV[i], 'tickets|' .. id .. '|' .. ARGV[i + 1])
    if tonumber(ARGV[i]) >= next_number then
      next_number = tonumber(ARGV[i]) + 1
      redis.call('HINCRBY', KEYS[4], 'issued', 1)
    end
  end
end
redis.call('HSET', KEYS[4], 'next', next_number)
if ARGV[2] ~= '' then
  redis.call('HSET', KEYS[2], 'number', ARGV[2], 'digest', ARGV[3], 'path', ARGV[4], 'lease', ARGV[5],
             'canary', ARGV[6])
end
for i = 8, 7 + num_resolved do
  redis.call('HDEL', KEYS[3], ARGV[i])
  redis.call('HDEL', KEYS[7], ARGV[i])
  redis.call('HDEL', KEYS[8], ARGV[i])
end
wake(KEYS[6])
return 1
"""
)

# Evaluation tickets are not outstanding work: they are in the stream or gone.
# KEYS lease, eval, wake of eval ; ARGV token, (ticket, payload)...
ISSUE_EVAL = (
    _FENCE
    + WAKE
    + """
for i = 2, #ARGV, 2 do redis.call('XADD', KEYS[2], '*', 't', ARGV[i], 'a', '0', 'p', ARGV[i + 1]) end
wake(KEYS[3])
return 1
"""
)

# Deletes the parts of entries that are deleted: KEYS from the given place on.
_UNLINK = """
local function unlink(first)
  for i = first, #KEYS do redis.call('UNLINK', KEYS[i]) end
end
"""

# The commit point: appends to the ledger, then acknowledges and deletes what the record covers.
# KEYS lease, ledger, scored, live, counters, then parts
# ARGV token, group, record, counter or '', drop 0|1, entry that the ledger ends with or '', then (ticket, entry)...
COMMIT = (
    _FENCE
    + _UNLINK
    + """
-- A call that is repeated after a broken connection appends nothing twice.
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', '1')
if #last > 0 and last[1][2][2] == ARGV[3] then return last[1][1] end
if ARGV[6] ~= '' and ARGV[6] ~= (#last > 0 and last[1][1] or '0') then
  return redis.error_reply('_LOST the ledger ends with ' .. (#last > 0 and last[1][1] or 'nothing'))
end
local id = redis.call('XADD', KEYS[2], '*', 'r', ARGV[3])
for i = 7, #ARGV, 2 do
  if ARGV[i + 1] ~= '' then
    redis.call('XACK', KEYS[3], ARGV[2], ARGV[i + 1])
    redis.call('XDEL', KEYS[3], ARGV[i + 1])
  end
  if ARGV[5] == '1' then redis.call('HDEL', KEYS[4], ARGV[i])
  else redis.call('HSET', KEYS[4], ARGV[i], 'committed|' .. id .. '|') end
  if ARGV[4] ~= '' then redis.call('HINCRBY', KEYS[5], ARGV[4], 1) end
end
unlink(6)
return id
"""
)

# Issues a ticket again whose scored group cannot be trained, and lets go of that group.
# KEYS lease, scored, live, tickets, wake of tickets, then parts ; ARGV token, group, entry, ticket, attempt, payload
REISSUE = (
    _FENCE
    + WAKE
    + _UNLINK
    + """
local place = redis.call('HGET', KEYS[3], ARGV[4])
if place and string.match(place, '[^|]*$') == ARGV[5] then return 0 end
local id = redis.call('XADD', KEYS[4], '*', 't', ARGV[4], 'a', ARGV[5], 'p', ARGV[6])
redis.call('HSET', KEYS[3], ARGV[4], 'tickets|' .. id .. '|' .. ARGV[5])
redis.call('XACK', KEYS[2], ARGV[2], ARGV[3])
redis.call('XDEL', KEYS[2], ARGV[3])
unlink(6)
wake(KEYS[5])
return 1
"""
)

# KEYS lease, scored, then parts ; ARGV token, group, entry   (a duplicate, or an evaluation result that was counted)
DISCARD = (
    _FENCE
    + _UNLINK
    + """
redis.call('XACK', KEYS[2], ARGV[2], ARGV[3])
unlink(3)
return redis.call('XDEL', KEYS[2], ARGV[3])
"""
)
