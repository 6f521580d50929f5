"""How many groups a reward service holds: those that are being scored, and those that wait for an open breaker.

Owns the two counts. Invariants: at most `num_permits` groups are scored at once; a group that waits for a breaker
releases its permit, so that groups of other functions go on; when its wait is over it comes before new ones, in order;
with `max_parked` waiting no more are taken.
"""

import asyncio
from collections.abc import Awaitable


class Permits:
    """Permits for groups that are scored, and the count of those parked."""

    def __init__(self, num_permits: int, max_parked: int) -> None:
        self._permits = asyncio.Semaphore(num_permits)
        self._max_parked = max_parked
        self._changed = asyncio.Event()
        self.num_parked = 0
        self.num_resuming = 0
        """Groups whose wait for a breaker is over, and that wait for a permit."""

    @property
    def takes_more(self) -> bool:
        """Whether new groups may be taken, if there is a permit."""
        return self.num_parked < self._max_parked

    @property
    def has_room(self) -> bool:
        """Whether a new group may be taken; `acquire` then does not wait."""
        return not self._permits.locked() and self.takes_more

    async def room(self) -> None:
        """Return when there is room."""
        while not self.has_room:
            self._changed.clear()
            await self._changed.wait()

    async def acquire(self) -> "Permit":
        """A permit; waits behind those who came before."""
        await self._permits.acquire()
        return Permit(self)

    async def acquire_again(self) -> None:
        """For a group that was parked."""
        self.num_resuming += 1
        try:
            await self._permits.acquire()
        finally:
            self.num_resuming -= 1

    def release(self) -> None:
        self._permits.release()
        self._changed.set()

    def parked(self, change: int) -> None:
        self.num_parked += change
        self._changed.set()


class Permit:
    """The permit of one group."""

    def __init__(self, permits: Permits) -> None:
        self._permits = permits
        self._held = True

    @property
    def is_wanted(self) -> bool:
        """Whether a group that has ended must release it, and not hand it on to a new one."""
        return self._permits.num_resuming > 0 or not self._permits.takes_more

    async def release_while(self, waiting: Awaitable[None]) -> None:
        """Park the group: without its permit until the wait is over and one is free again."""
        self.release()
        self._permits.parked(+1)
        try:
            await waiting
            await self._permits.acquire_again()
            self._held = True
        finally:
            self._permits.parked(-1)

    def release(self) -> None:
        """Give the permit up; safe to repeat."""
        if self._held:
            self._held = False
            self._permits.release()
