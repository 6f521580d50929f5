"""Reads queue, outstanding tickets, stragglers and other services once a second, and renews the trainer's heartbeat.

Owns no state; it writes what it reads to metrics and status.
"""

import asyncio
import os
import socket
from collections import Counter
from dataclasses import dataclass

from penstock.broker import Queue, memory_use
from penstock.contracts import ServiceKind
from penstock.contracts.services import ServiceRecord
from penstock.tickets import TicketBook
from penstock_trainer.rollouts.stragglers import Stragglers
from penstock_trainer.telemetry.metrics import TrainerMetrics
from penstock_trainer.telemetry.scrape_targets import ScrapeTargets
from penstock_trainer.telemetry.status import Status
from penstock_trainer.weight_sync.publisher import Fences

SAMPLE_SECONDS = 1.0


@dataclass(frozen=True)
class Sampler:
    """Samples the run. name, url: of the trainer."""

    queue: Queue
    book: TicketBook
    stragglers: Stragglers
    fences: Fences
    targets: ScrapeTargets
    metrics: TrainerMetrics
    status: Status
    name: str
    url: str
    heartbeat_seconds: float

    async def sample(self) -> None:
        """Sample until the process ends."""
        while True:
            await self._read()
            await self.stragglers.look()
            self._write()
            await self._register()
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _read(self) -> None:
        depths = await self.queue.depths()
        self.metrics.queue.show_streams(depths, await self.queue.oldest_age_seconds())
        self.metrics.queue.show_memory(await memory_use(self.queue))
        records = await self.queue.services()
        kinds = Counter(record.kind for record in records)
        self.metrics.queue.show_services(kinds, self.fences.server_states(records))
        await asyncio.to_thread(self.targets.write, records)
        self.status.queue = depths

    def _write(self) -> None:
        self.status.outstanding = self.book.num_outstanding
        self.metrics.queue.outstanding.set(self.status.outstanding)
        self.status.oldest_waiting_seconds = self.stragglers.oldest_seconds
        self.metrics.queue.oldest_waiting.set(self.stragglers.oldest_seconds)
        self.status.waiting_for = self.stragglers.straggler

    async def _register(self) -> None:
        record = ServiceRecord(
            ServiceKind.TRAINER,
            self.name,
            self.url,
            os.getpid(),
            self.status.phase,
            self.status.policy,
            socket.gethostname(),
        )
        await self.queue.register(record, self.heartbeat_seconds)
