"""Once a second: depths of the queue, outstanding tickets, stragglers, and the sign of life that others see.

Owns no state of its own; what it reads goes to metrics and status. Called by the wiring, beside the loop.
"""

import asyncio
import os
import socket
from dataclasses import dataclass

from penstock.broker import Queue, ServiceRecord, Stage
from penstock.contracts import PolicyIdentity
from penstock.tickets import TicketBook
from penstock_trainer.metrics import TrainerMetrics
from penstock_trainer.status import Status
from penstock_trainer.stragglers import Stragglers

SAMPLE_SECONDS = 1.0


@dataclass(frozen=True)
class Sampler:
    """Reads and writes down. name, url: of the trainer."""

    queue: Queue
    book: TicketBook
    stragglers: Stragglers
    metrics: TrainerMetrics
    status: Status
    name: str
    url: str
    heartbeat_seconds: float

    async def sample(self) -> None:
        """Until the process ends."""
        while True:
            await self._read()
            await self.stragglers.look()
            self._write()
            await self._register()
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _read(self) -> None:
        depths = await self.queue.depths()
        ages = await self.queue.oldest_age_seconds()
        for stream, depth in depths.items():
            self.metrics.queue_groups.labels(stream=stream).set(depth)
        for stage in Stage:
            self.metrics.queue_oldest_age.labels(stream=stage).set(ages[stage])
        self.status.queue = depths

    def _write(self) -> None:
        self.status.outstanding = len(self.book.outstanding)
        self.metrics.tickets_outstanding.set(self.status.outstanding)
        self.status.oldest_waiting_seconds = self.stragglers.oldest_seconds
        self.metrics.oldest_waiting.set(self.stragglers.oldest_seconds)
        self.status.waiting_for = self.stragglers.straggler

    async def _register(self) -> None:
        policy = PolicyIdentity(self.status.version, self.status.version_digest)
        record = ServiceRecord(
            "trainer", self.name, self.url, os.getpid(), self.status.phase, policy, socket.gethostname()
        )
        await self.queue.register(record, self.heartbeat_seconds)
