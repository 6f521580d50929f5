-- USES now
--
-- wake(waiting, count): ends the wait of as many workers as there are new entries, the longest wait first. Each waits at
-- a list of its own: the server goes through all clients that wait at a key whenever one of them is woken. At most
-- MOST_WOKEN are woken at once, so that a storm of them does not hold up the queue; whoever takes an entry wakes the next
-- (pass_on() in take.lua). A full server may wake nobody; those who wait ask again. Answers how many it has woken.
local MOST_WOKEN = 64
local WOKEN_MS = 10000  -- of a wake-up that nobody takes: the worker is dead or cut off; others ask meanwhile

local function wake(waiting, count)
  local left, prefix, now_ms = math.min(count, MOST_WOKEN), string.match(waiting, '^(.*:)waiting:'), now()
  local num_woken = 0
  while left > 0 do
    local first = redis.call('ZPOPMIN', waiting, left)
    if #first == 0 then return num_woken end
    for i = 1, #first, 2 do
      if tonumber(first[i + 1]) > now_ms then  -- else it has given up its wait
        local pushed = redis.pcall('RPUSH', prefix .. 'woken:' .. first[i], '1')
        if tonumber(pushed) then num_woken = num_woken + 1 end
        redis.pcall('PEXPIRE', prefix .. 'woken:' .. first[i], WOKEN_MS)
        left = left - 1
      end
    end
  end
  return num_woken
end
