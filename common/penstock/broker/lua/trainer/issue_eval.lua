-- KEYS lease eval eval_waiting
-- ARGV token issued(ticket payload)...
-- USES require_lease wake
--
-- Puts evaluation tickets into their stream. They are not outstanding work: they are in the stream or gone. Answers 1.
--
-- Repeated, it adds them again; the trainer discards the second result of a ticket.
for _, each in ipairs(issued) do
  redis.call('XADD', eval, '*', 't', each.ticket, 'a', '0', 'p', each.payload)
end
wake(eval_waiting, #issued)
return 1
