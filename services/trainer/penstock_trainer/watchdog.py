"""Ends a run that makes no progress: StallError with the ticket and the services that it waits for.

Owns the clock of the last progress. Invariant: no wait of the trainer lasts longer than run.stall_seconds without a
step, an arrival or a push. The trainer's own computation is not a wait, and the start of an engine has its own
deadline.
"""

import asyncio
import contextlib
from collections.abc import Iterator

from penstock.broker.trainer import TrainerQueue
from penstock.contracts import ServerState
from penstock.errors import StallError
from penstock.tickets import TicketBook
from penstock_trainer.telemetry.status import Status

CHECKS_PER_LIMIT = 20
LONGEST_CHECK_SECONDS = 5.0


class Watchdog:
    """The time of the last progress of one trainer."""

    def __init__(self, trainer_queue: TrainerQueue, book: TicketBook, status: Status, stall_seconds: float) -> None:
        self._queue = trainer_queue
        self._book = book
        self._status = status
        self._stall_seconds = stall_seconds
        self._num_computing = 0
        self._last_progress = asyncio.get_running_loop().time()

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Around the trainer's own work, which is never a stall."""
        self._num_computing += 1
        try:
            yield
        finally:
            self._num_computing -= 1
            self.progress()

    def progress(self) -> None:
        """Note a step, an arrival or a push."""
        self._last_progress = asyncio.get_running_loop().time()

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last progress; 0 while the trainer computes."""
        return 0.0 if self._num_computing else asyncio.get_running_loop().time() - self._last_progress

    async def watch_progress(self) -> None:
        """StallError after run.stall_seconds without progress."""
        while True:
            await asyncio.sleep(min(LONGEST_CHECK_SECONDS, self._stall_seconds / CHECKS_PER_LIMIT))
            if self._num_computing or await self._engine_is_starting():
                self.progress()
            if self.idle_seconds > self._stall_seconds:
                raise StallError(
                    f"no progress for {self.idle_seconds:.0f} s (run.stall_seconds; with agents, agent.timeout_seconds "
                    f"is added), while {self._status.phase}: "
                    f"{await self.waiting_for()}"
                )

    async def _engine_is_starting(self) -> bool:
        services = await self._queue.queue.services()
        return any(each.server_state is ServerState.STARTING for each in services)

    async def waiting_for(self) -> str:
        """The ticket that the next batch waits for, its place in the queue, and the services."""
        services = [f"{each.name} ({each.state})" for each in await self._queue.queue.services()]
        running = f"services seen: {', '.join(services) or 'none'}"
        if fenced := self._status.fenced:
            running += f"; fenced at the last push: {'; '.join(f'{name}: {why}' for name, why in fenced.items())}"
        number = self._book.oldest_waiting
        if number is None:
            return running
        place = await self._queue.queue.whereabouts(number)
        return f"waiting for ticket {number}, {place}; {running}"
