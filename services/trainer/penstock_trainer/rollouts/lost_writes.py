"""Notices that the queue has gone back in time: a host that crashed lost what its file had not reached the disk with.

Owns the comparison of what this trainer knows with what the queue holds: the end of the ledger, the announced version,
a place for every outstanding ticket. Invariant: where the queue has lost writes that it had acknowledged, the trainer
ends with LostWritesError within a few looks and starts again from the ledger, instead of building on steps that the
ledger lacks or waiting for tickets that are nowhere.
"""

import asyncio
from collections.abc import Iterable, Mapping

from penstock.broker.trainer import TrainerQueue
from penstock.errors import LostWritesError
from penstock.tickets import TicketBook, TicketState
from penstock_trainer.rollouts.consumer import Consumer
from penstock_trainer.rollouts.versions import Versions

LOOKS_PER_HEARTBEAT = 3
RESTART = "the queue has lost writes that it had acknowledged; the trainer starts again from the ledger"


class LostWrites:
    """Compares, a few times per heartbeat."""

    def __init__(
        self, queue: TrainerQueue, book: TicketBook, consumer: Consumer, versions: Versions, heartbeat_seconds: float
    ) -> None:
        self._queue = queue
        self._book = book
        self._consumer = consumer
        self._versions = versions
        self._look_seconds = heartbeat_seconds / LOOKS_PER_HEARTBEAT
        self._suspects: set[str] = set()

    async def watch_queue(self) -> None:
        """Look for ever, once it is known which tickets are outstanding."""
        await self._consumer.begun()
        while True:
            await self.look()
            await asyncio.sleep(self._look_seconds)

    async def look(self) -> None:
        """LostWritesError for what was missing at the last look too: what is being written may be missing once."""
        if not await self._queue.ends_as_written():
            raise LostWritesError(f"the ledger does not end with what was written last: {RESTART}")
        missing = set(nowhere(self._book.outstanding, await self._queue.live()))
        announced = await self._queue.queue.announced()
        if announced is not None and announced.identity.number < self._versions.announced_version:
            missing.add(f"announced version {self._versions.announced_version}")
        if lost := missing & self._suspects:
            raise LostWritesError(f"{', '.join(sorted(lost))}: missing in the queue; {RESTART}")
        self._suspects = missing


def nowhere(outstanding: Mapping[int, TicketState], live: Mapping[int, str]) -> Iterable[str]:
    """Outstanding tickets that have no place in the queue."""
    return [f"ticket {number}" for number in outstanding if number not in live]
