"""A second book of tickets: one dictionary, of which every answer is read anew; slow and plain."""

import math

from penstock.tickets import TicketLimits, TicketState


class PlainBook:
    """The answers of a `TicketBook` to the same calls."""

    def __init__(self, limits: TicketLimits) -> None:
        self.limits = limits
        self.states: dict[int, TicketState] = {}
        self.step_of: dict[int, int] = {}
        self.shares: list[float] = []
        self.next_number = 0
        self.num_steps = 0

    def of(self, state: TicketState) -> list[int]:
        return sorted(number for number, each in self.states.items() if each is state)

    def outstanding(self) -> dict[int, TicketState]:
        return dict(sorted(self.states.items()))

    def oldest_waiting(self) -> int | None:
        return min(self.of(TicketState.WAITING), default=None)

    def needed(self) -> int:
        if not self.limits.max_steps:
            return self.limits.num_draws
        pending = len(self.of(TicketState.WAITING)) + len(self.of(TicketState.ARRIVED))
        return max(0, (self.limits.max_steps - self.num_steps) * self.limits.batch_size - pending)

    def draws_ended(self) -> bool:
        return self.next_number >= self.limits.num_draws or self.needed() == 0

    def finished(self) -> bool:
        return self.draws_ended() and all(state is TicketState.COMMITTED for state in self.states.values())

    def issue(self) -> list[int]:
        room = self.limits.max_outstanding - len(self.states)
        count = max(0, min(room, self.limits.num_draws - self.next_number, self.needed()))
        numbers = [self.next_number + index for index in range(count)]
        self.next_number += count
        self.states |= dict.fromkeys(numbers, TicketState.WAITING)
        return numbers

    def next_batch(self) -> list[int] | None:
        batch: list[int] = []
        for number, state in self.outstanding().items():
            if state is TicketState.WAITING and self.limits.order == "ticket":
                return None
            if state is TicketState.ARRIVED:
                batch.append(number)
            if len(batch) == self.limits.batch_size:
                return batch
        return batch if batch and self.draws_ended() and not self.of(TicketState.WAITING) else None

    def blocked_by(self) -> int | None:
        waiting = self.of(TicketState.WAITING)
        if not waiting or self.next_batch() is not None:
            return None
        is_last = self.draws_ended() and len(waiting) == 1
        return waiting[0] if is_last or len(self.of(TicketState.ARRIVED)) + 1 >= self.limits.batch_size else None

    def commit(self, batch: list[int]) -> int:
        self.states |= dict.fromkeys(batch, TicketState.COMMITTED)
        self.step_of |= dict.fromkeys(batch, self.num_steps)
        self.num_steps += 1
        return self.num_steps - 1

    def announce(self, num_steps: int) -> list[int]:
        resolved = [number for number, step in self.step_of.items() if step < num_steps]
        for number in resolved:
            del self.states[number], self.step_of[number]
        return resolved

    def failed_share(self, num_tickets: int) -> float:
        return math.fsum(self.shares[-num_tickets:]) / num_tickets
