"""A trainer's life over a real queue, which a test moves step by step.

Owns the memory of a trainer's process, from taking its lease to losing it. Its actions go through the product's own
classes, in the order of `penstock_trainer.loop`.
"""

import asyncio

from penstock.broker import Delivery, Queue, Stage, Worker
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import PolicyIdentity, Sampling
from penstock.contracts.ledger import CheckpointRecord, LedgerState, RunRecord, StepRecord, WeightsRecord
from penstock.contracts.services import Announcement
from penstock.run_home import RunHome
from penstock.tickets import TicketBook, TicketLimits
from penstock_trainer.data.drawing.draws import Draws
from penstock_trainer.data.prompts import EncodedPrompt
from penstock_trainer.grpo import varies
from penstock_trainer.rollouts.consumer import Arrival, Consumer
from penstock_trainer.rollouts.evaluation import Evaluation
from penstock_trainer.rollouts.generation_time import GenerationTime
from penstock_trainer.rollouts.issuing import Issuer
from penstock_trainer.rollouts.judge import Rules
from penstock_trainer.rollouts.reconcile import restore_tickets
from penstock_trainer.rollouts.versions import Versions
from penstock_trainer.telemetry.metrics import TrainerMetrics

PROMPTS = [EncodedPrompt(f"p{n}", (n + 1,), "a", "", {}) for n in range(10)]
INITIAL = PolicyIdentity(0, "a" * 16)
SAMPLING = Sampling(1.0, 4, (2,))


def weights(version: int, bits: int) -> PolicyIdentity:
    """The identity of a version; trainers whose arithmetic is not deterministic differ in `bits`."""
    return PolicyIdentity(version, f"{version:08x}{bits:08x}") if version else INITIAL


class _DrainedError(Exception):
    """The trainer's worker has taken as many groups as it was allowed to."""


class _TrainerWorker(Worker):
    """Ends the consumer's endless loop after some groups, instead of waiting for more."""

    num_allowed = 0

    async def take_several(self, stage: Stage, limit: int) -> list[Delivery]:
        if self.num_allowed == 0:
            raise _DrainedError
        taken = await super().take_several(stage, min(limit, self.num_allowed))
        self.num_allowed -= len(taken)
        return taken

    async def wait(self, *, timeout_seconds: float) -> None:
        raise _DrainedError


async def _nothing() -> None:
    """No letter is noted."""


class TrainerLife:
    """One process of the trainer, from taking its lease to losing it. The order of its steps is that of `loop`."""

    def __init__(self, trainer_queue: TrainerQueue, config: Config, *, batch_size: int, dynamic_sampling: bool) -> None:
        self.queue = trainer_queue
        self.max_staleness = config.staleness.max_staleness
        self.draws = Draws(PROMPTS, SAMPLING, config)
        self.credits = (self.max_staleness + 1) * batch_size
        self.book = TicketBook(TicketLimits(batch_size, self.credits, self.draws.num_draws))
        self.worker = _TrainerWorker(trainer_queue.queue, "trainer", config.staleness, take_over=True)
        self.versions = Versions()
        metrics = TrainerMetrics().queue
        self.issuer = Issuer(trainer_queue, self.draws, self.book, self.versions, metrics)
        self.consumer = Consumer(
            trainer_queue,
            self.worker,
            self.book,
            self.issuer,
            self.versions,
            Evaluation((), trainer_queue.lease.number, config),
            GenerationTime(),
            asyncio.Event(),
            Rules(
                has_gradient=lambda group: varies([score.value for score in group.scores]),
                has_advantage=lambda group: varies([score.value for score in group.scores]),
                sampling=SAMPLING,
                dynamic_sampling=dynamic_sampling,
                max_staleness=self.max_staleness,
            ),
            metrics,
            drop=trainer_queue.drop,
            dropped=lambda reason, group: None,
            buried=_nothing,
        )
        self.version = 0
        self.untrained: list[Arrival] | None = None
        """The committed batch whose update has not ended."""
        self.release: tuple[Announcement, int] | None = None
        """Weights that are recorded and not announced, and the steps that they include."""

    async def begin(self, ledger: LedgerState, bits: int) -> None:
        """Resume from the ledger as `resume` does: the weights are recorded again if their bits differ."""
        if ledger.run is None:
            await self.queue.append(RunRecord("d" * 16, len(PROMPTS), 1, 2, 0))
        self.version = ledger.num_steps
        self.versions.restore(ledger.policies)
        await restore_tickets(
            self.queue, self.book, self.issuer, ledger, steps=self.version, version=self.version,
            max_staleness=self.max_staleness,
        )  # fmt: skip
        if (announced := await self.queue.queue.announced()) is not None:
            self.versions.announce(announced.identity)
        self.consumer.begin()
        identity = weights(self.version, bits)
        if self.versions.known.get(self.version) == identity:
            self.release = (self._announcement(identity), ledger.num_steps)
        else:
            self.versions.replace(identity)
            await self._record(identity, ledger.num_steps)

    async def judge(self, count: int) -> None:
        self.worker.num_allowed = count
        try:
            await self.consumer.consume_groups()
        except _DrainedError:
            return

    async def close_batch(self, files: dict[str, tuple[int, ...]]) -> list[Arrival] | None:
        """Write the step file and commit, if a batch is complete."""
        batch = await self.consumer.next_batch(self.version)
        if batch is None:
            return None
        numbers = [arrival.number for arrival in batch]
        step = self.book.num_steps
        record = StepRecord(step, tuple(numbers), f"{step}.{self.queue.lease.number}.pack", f"digest of {numbers}")
        files[record.file] = record.tickets
        await self.queue.commit_step(record, {each.number: each.delivery for each in batch})
        self.book.commit(numbers)
        self.consumer.release(batch)
        self.untrained = batch
        return batch

    async def finish_update(self, bits: int) -> None:
        self.untrained = None
        self.version += 1
        await self._record(weights(self.version, bits), self.book.num_steps)

    async def announce(self) -> None:
        """Announce as `Releases.publish` does once the push has ended."""
        assert self.release is not None
        announcement, num_steps = self.release
        self.release = None
        self.versions.announce(announcement.identity)
        await self.issuer.announce(announcement, num_steps)

    async def checkpoint(self) -> None:
        steps = self.book.num_steps
        await self.queue.append(CheckpointRecord(steps, f"{steps}.{self.queue.lease.number}"))

    async def _record(self, identity: PolicyIdentity, num_steps: int) -> None:
        self.versions.add(identity)
        await self.queue.append(WeightsRecord(identity, num_steps))
        self.release = (self._announcement(identity), num_steps)

    def _announcement(self, identity: PolicyIdentity) -> Announcement:
        return Announcement(identity, "/weights", self.queue.lease.number)


async def next_life(
    queue: Queue, config: Config, home: RunHome, *, batch_size: int, dynamic_sampling: bool
) -> TrainerLife:
    """A new trainer takes the lease, as if the earlier one had expired."""
    await queue.client.delete(queue.keys.lease)
    lease = await acquire_lease(queue, config, home)
    return TrainerLife(TrainerQueue(queue, lease), config, batch_size=batch_size, dynamic_sampling=dynamic_sampling)
