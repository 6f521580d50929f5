-- unlink(): deletes the parts of the entries that the script deletes. Needs: parts....
local function unlink()
  -- Key by key: unpack fails above 8000.
  for _, part in ipairs(parts) do redis.call('UNLINK', part) end
end
