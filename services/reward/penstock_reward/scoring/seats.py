"""How many groups a reward service holds: those that are being scored, and those that wait for an open breaker.

Owns the two counts. Invariants: at most `num_seats` groups are scored at once; a group that waits for a breaker leaves
its seat, so that groups of other functions go on; when its wait is over it comes before new ones, in order; with
`max_parked` waiting no more are taken.
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
        self.num_standing = 0
        """Whose wait for a breaker is over, and who wait for a seat."""

    @property
    def takes_more(self) -> bool:
        """Whether new groups may be taken, where there is a seat."""
        return self.num_parked < self._max_parked

    @property
    def has_room(self) -> bool:
        """Whether a new group may be taken; `take` then does not wait."""
        return not self._seats.locked() and self.takes_more

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
        self.num_standing += 1
        try:
            await self._seats.acquire()
        finally:
            self.num_standing -= 1

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

    @property
    def is_wanted(self) -> bool:
        """Whether a group that has ended must leave it, and not hand it on to a new one."""
        return self._seats.num_standing > 0 or not self._seats.takes_more

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
