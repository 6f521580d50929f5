-- wake(stream): ends the wait of all readers of a wake-up stream. One entry is enough: it only signals that something
-- is new.
local function wake(stream)
  redis.call('XADD', stream, 'MAXLEN', '1', '*', 'w', '1')
end
