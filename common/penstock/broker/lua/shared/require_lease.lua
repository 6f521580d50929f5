-- USES holder
--
-- Ends the script with an error, and nothing changed, unless this trainer holds the lease. Needs: lease, token.
if holder ~= token then return lease_lost() end
