-- is_live(): whether a trainer holds the lease, or a launcher the run. Needs: lease, launcher.
local function is_live()
  return redis.call('EXISTS', lease, launcher) > 0
end
