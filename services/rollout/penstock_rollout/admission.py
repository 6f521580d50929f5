"""Which calls run, and which wait for room: first come, first served, and no more wait than have a place.

Invariants: the running calls have at most `max_running` completions together, unless one call alone is larger; a call
that has come later never runs first; whoever waits gets room, an error or is cancelled.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

from penstock.errors import EngineBusyError


class Admission:
    """Room for the completions of calls."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        """`max_running`: completions; `max_waiting`: calls."""
        self.max_running = max_running
        self.max_waiting = max_waiting
        self._num_running = 0
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self.closed = ""
        """Why nobody gets room any more; empty: they do."""

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @contextlib.asynccontextmanager
    async def room(self, num_completions: int) -> AsyncIterator[None]:
        """Surrounds a call that runs. EngineBusyError if too many wait already, or after `close`."""
        await self._enter(num_completions)
        try:
            yield
        finally:
            self._leave(num_completions)

    def close(self, reason: str) -> None:
        """Refuse those that wait, and all that come, for this reason."""
        self.closed = reason
        while self._waiting:
            turn, _ = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(EngineBusyError(reason))

    async def _enter(self, num_completions: int) -> None:
        if self.closed:
            raise EngineBusyError(self.closed)
        if not self._waiting and self._fits(num_completions):
            self._num_running += num_completions
            return
        if len(self._waiting) >= self.max_waiting:
            raise EngineBusyError(
                f"{self._num_running} completions run here and {len(self._waiting)} calls wait; expected at most "
                f"{self.max_waiting} to wait: try again later, or add rollout servers"
            )
        turn = asyncio.get_running_loop().create_future()
        place = (turn, num_completions)
        self._waiting.append(place)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:  # it got room just then
                self._leave(num_completions)
            elif place in self._waiting:
                self._waiting.remove(place)
                self._admit()  # those behind it may need less
            raise

    def _leave(self, num_completions: int) -> None:
        self._num_running -= num_completions
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0][1]):
            turn, num_completions = self._waiting.popleft()
            if not turn.cancelled():
                self._num_running += num_completions
                turn.set_result(None)

    def _fits(self, num_completions: int) -> bool:
        return not self._num_running or self._num_running + num_completions <= self.max_running
