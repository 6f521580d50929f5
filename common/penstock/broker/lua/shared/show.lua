-- USES stranger live
--
-- show(now_ms): shows the service to the others for alive_ms from now on, beside its kind and the digest of its
-- configuration. It answers whether it does: a stranger to a run that lives is not shown any more.
-- Needs: services, identity, lease, launcher, name, record, alive_ms, kind, digest.
local function show(now_ms)
  if is_stranger and is_live() then
    redis.call('HDEL', services, name)
    return false
  end
  local shown_until = string.format('%d', now_ms + alive_ms)
  redis.call('HSET', services, name, shown_until .. '|' .. kind .. '|' .. digest .. '|' .. record)
  return true
end
