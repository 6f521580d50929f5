-- KEYS services identity lease launcher
-- ARGV name record alive_ms kind digest
-- USES now show
--
-- Shows a service to the others for alive_ms. Answers 1, or the error _STRANGER if the run lives and is of another
-- configuration: then it is not shown any more.
--
-- Repeated, it writes the record again, with a later deadline.
if not show(now()) then return refused() end
return 1
