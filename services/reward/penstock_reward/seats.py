"""How many groups a reward service holds: those that are being scored, and those that wait for an open breaker.

Owns the two counts. Invariants: at most `num_seats` groups are scored at once; a group that waits for a breaker leaves
its seat, so that groups of other functions go on; when its wait is over it comes before new ones, in order; with
`max_parked` waiting no more are taken. Called by `worker`.
"""

import asyncio
from collections.abc import Awaitable


class Seats:
    """Seats for groups that are scored, and the count of those parked."""

    def __init__(self, num_seats: int, max_parked: int) -> None:
        self._seats = asyncio.Semaphore(num_seats)
        self._max_parked = max_parked
        self._changed = asyncio.Event()
        self.num_parked = 0

    @property
    def has_room(self) -> bool:
        """Whether a new group may be taken; `take` then does not wait."""
        return not self._seats.locked() and self.num_parked < self._max_parked

    async def room(self) -> None:
        """Return when there is room."""
        while not self.has_room:
            self._changed.clear()
            await self._changed.wait()

    async def take(self) -> "Seat":
        """A seat; waits behind those who came before."""
        await self._seats.acquire()
        return Seat(self)

    async def sit_down(self) -> None:
        await self._seats.acquire()

    def stand_up(self) -> None:
        self._seats.release()
        self._changed.set()

    def parked(self, change: int) -> None:
        self.num_parked += change
        self._changed.set()


class Seat:
    """The seat of one group."""

    def __init__(self, seats: Seats) -> None:
        self._seats = seats
        self._taken = True

    async def leave_while(self, waiting: Awaitable[None]) -> None:
        """Park the group: without its seat until the wait is over and a seat is free again."""
        self.leave()
        self._seats.parked(+1)
        try:
            await waiting
            await self._seats.sit_down()
            self._taken = True
        finally:
            self._seats.parked(-1)

    def leave(self) -> None:
        """Give the seat up; safe to repeat."""
        if self._taken:
            self._taken = False
            self._seats.stand_up()
