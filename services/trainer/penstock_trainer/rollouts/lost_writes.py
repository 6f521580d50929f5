"""Detects lost queue writes: after a host crash Redis may come back without its last, unflushed writes.

Owns the comparison of the trainer's state with the queue: the end of the ledger, the announced version, the outstanding
tickets. Invariant: if the queue has lost writes that it had acknowledged, the trainer ends with LostWritesError after a
few comparisons and starts again from the ledger. Otherwise it would build on steps that the ledger lacks, or wait for
tickets that are in no stream of the queue.
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
    """Compares trainer and queue a few times per heartbeat."""

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
        """Compare for ever, after the consumer has begun."""
        await self._consumer.begun()
        while True:
            await self.look()
            await asyncio.sleep(self._look_seconds)

    async def look(self) -> None:
        """LostWritesError if something is missing twice in a row: once, it may still be on its way to the queue."""
        if not await self._queue.ends_as_written():
            raise LostWritesError(f"the ledger does not end with what was written last: {RESTART}")
        missing = set(in_no_stream(self._book.outstanding, await self._queue.live()))
        announced = await self._queue.queue.announced()
        if announced is not None and announced.identity.number < self._versions.announced_version:
            missing.add(f"announced version {self._versions.announced_version}")
        if lost := missing & self._suspects:
            raise LostWritesError(f"{', '.join(sorted(lost))}: missing in the queue; {RESTART}")
        self._suspects = missing


def in_no_stream(outstanding: Mapping[int, TicketState], live: Mapping[int, str]) -> Iterable[str]:
    """The outstanding tickets that are in no stream of the queue."""
    return [f"ticket {number}" for number in outstanding if number not in live]
