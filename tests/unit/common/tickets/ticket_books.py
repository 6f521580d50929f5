"""Small ticket books of both orders."""

from penstock.tickets import TicketBook, TicketLimits


def make_book(batch_size: int = 2, max_staleness: int = 1, num_draws: int = 100, max_steps: int = 0) -> TicketBook:
    return TicketBook(TicketLimits(batch_size, (max_staleness + 1) * batch_size, num_draws, max_steps))


def make_ready_book(
    batch_size: int = 2, max_staleness: int = 1, num_draws: int = 100, max_steps: int = 0
) -> TicketBook:
    credits = (max_staleness + 1) * batch_size
    return TicketBook(TicketLimits(batch_size, credits, num_draws, max_steps, order="ready"))
