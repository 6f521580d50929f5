"""The number of groups that a reward service holds: those in scoring, and those parked by an open breaker.

Owns the two counts. Invariants: at most `num_permits` groups are scored at once; a group that waits for a breaker
releases its permit, so that groups of other functions continue; after its wait it comes before new groups, in order;
while `max_parked` groups wait, no new ones are taken.
"""

import asyncio
from collections.abc import Awaitable


class Permits:
    """Permits for groups in scoring, and the count of the parked ones."""

    def __init__(self, num_permits: int, max_parked: int) -> None:
        self._permits = asyncio.Semaphore(num_permits)
        self._max_parked = max_parked
        self._changed = asyncio.Event()
        self.num_parked = 0
        self.num_resuming = 0
        """Groups that no longer wait for a breaker, but for a permit."""

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
        """A permit; waits for all earlier requests."""
        await self._permits.acquire()
        return Permit(self)

    async def acquire_again(self) -> None:
        """A permit for a group that was parked."""
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
        """Whether an ended group must not pass its permit to a new one: others wait for it, or it has none."""
        return not self._held or self._permits.num_resuming > 0 or not self._permits.takes_more

    async def release_while(self, waiting: Awaitable[None]) -> None:
        """Park the group: release its permit, and take one again after the wait."""
        self.release()
        self._permits.parked(+1)
        try:
            await waiting
            await self._permits.acquire_again()
            self._held = True
        finally:
            self._permits.parked(-1)

    def release(self) -> None:
        """Release the permit; safe to repeat."""
        if self._held:
            self._held = False
            self._permits.release()
