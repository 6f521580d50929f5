"""Stragglers: the waiting time of the oldest ticket, and the ticket that holds up a batch.

Owns the clocks of waiting tickets, which start anew with each life of the trainer. Invariant: it only reads; training
does not depend on it.
"""

import logging
import time
from collections.abc import Callable
from typing import Protocol

from penstock.tickets import TicketBook, TicketState

log = logging.getLogger(__name__)


class TicketLocator(Protocol):
    """Finds a ticket in the queue."""

    async def whereabouts(self, ticket: int) -> str: ...


class Stragglers:
    """The waiting tickets of one trainer."""

    def __init__(
        self,
        queue: TicketLocator,
        book: TicketBook,
        *,
        straggler_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """straggler_seconds: a ticket that holds up a batch for so long is logged, and again after each such time."""
        self._queue = queue
        self._book = book
        self._straggler_seconds = straggler_seconds
        self._clock = clock
        self._waiting_since: dict[int, float] = {}
        self._blocking: int | None = None
        self._blocking_since = 0.0
        self._reported_at: dict[int, float] = {}
        self.oldest_seconds = 0.0
        """The waiting time of the oldest waiting ticket; 0 if no ticket waits."""
        self.straggler = ""
        """The ticket that holds up a batch, since when, and its holder; empty until it has done so for long."""

    async def look(self) -> None:
        """Bring both up to date; write a log line if one is due."""
        now = self._clock()
        waiting = [n for n, state in self._book.outstanding.items() if state is TicketState.WAITING]
        self._waiting_since = {n: self._waiting_since.get(n, now) for n in waiting}
        self._reported_at = {n: at for n, at in self._reported_at.items() if n in self._waiting_since}
        self.oldest_seconds = now - self._waiting_since[waiting[0]] if waiting else 0.0
        blocking = self._book.blocked_by
        if blocking != self._blocking:
            self._blocking, self._blocking_since = blocking, now
        if blocking is None or now - self._blocking_since < self._straggler_seconds:
            self.straggler = ""
            return
        self.straggler = await self._describe(blocking, now)
        if now - self._reported_at.get(blocking, -self._straggler_seconds) >= self._straggler_seconds:
            self._reported_at[blocking] = now
            log.warning("a batch waits for %s", self.straggler)

    async def _describe(self, ticket: int, now: float) -> str:
        place = await self._queue.whereabouts(ticket)
        return (
            f"ticket {ticket}, {place}: it has been waiting for {now - self._waiting_since[ticket]:.0f} s and has held "
            f"up a batch, whose other groups are here, for {now - self._blocking_since:.0f} s"
        )
