-- wake(stream): ends the wait of those who read a wake-up stream. It says only that something is new: one entry is
-- enough.
local function wake(stream)
  redis.call('XADD', stream, 'MAXLEN', '1', '*', 'w', '1')
end
