-- wake(list, count): ends the wait of as many workers as there are new entries, the longest wait first. Each entry in
-- the list wakes one worker. At most MOST_WOKEN are woken at once, so that a storm of them does not hold up the queue;
-- whoever takes an entry wakes the next (pass_on() in take.lua). A full server wakes nobody where this is the script's
-- first write; those who wait ask again within a second.
local MOST_WOKEN = 64

local function wake(list, count)
  for _ = 1, math.min(count, MOST_WOKEN) do redis.pcall('RPUSH', list, '1') end
  redis.call('LTRIM', list, 0, MOST_WOKEN - 1)
end
