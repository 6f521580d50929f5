"""A run in miniature on a real queue: rollout servers, reward workers and trainers that a test moves by hand.

Owns the parts that stand outside the queue (who holds what, which weights a server serves, step files) and what a step
of each does through the product's own classes. Time decides nothing: nobody beats or renews but where a test says so.
Called by `test_broker_stateful`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock.broker import Announcement, Delivery, Queue, Stage, Worker
from penstock.broker.keys import GROUP
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import (
    Completion,
    PolicyIdentity,
    RolloutGroup,
    Sampling,
    Score,
    ScoredGroup,
    Ticket,
    VersionSpan,
    decode,
    pack_float32,
    pack_int32,
)
from penstock.ledger import CheckpointRecord, LedgerState, RunRecord, StepRecord, WeightsRecord
from penstock.tickets import TicketBook, TicketLimits
from penstock_trainer.batch import varies
from penstock_trainer.consumer import Arrival, Consumer
from penstock_trainer.draws import Draws
from penstock_trainer.evaluation import Evaluation
from penstock_trainer.metrics import TrainerMetrics
from penstock_trainer.prompts import EncodedPrompt
from penstock_trainer.reconcile import restore_tickets

PROMPTS = [EncodedPrompt(f"p{n}", (n + 1,), "a", "", {}) for n in range(10)]
INITIAL = PolicyIdentity(0, "a" * 16)


def weights(version: int, bits: int) -> PolicyIdentity:
    """Weights of a version; `bits` tells apart what trainers without deterministic arithmetic compute."""
    return PolicyIdentity(version, f"{version:08x}{bits:08x}") if version else INITIAL


@dataclass
class Holding:
    """A message that a worker took, and the weights that its server had then."""

    delivery: Delivery
    message: Ticket | RolloutGroup
    policy: PolicyIdentity


@dataclass
class Holder:
    """One rollout or reward worker. It does not know whether others believe it dead."""

    worker: Worker
    stage: Stage
    policy: PolicyIdentity
    lease: int = 0
    holds: list[Holding] = field(default_factory=list)

    def load(self, announcement: Announcement) -> None:
        self.policy, self.lease = announcement.identity, announcement.lease

    def is_behind(self, announcement: Announcement) -> bool:
        """The weights of a later trainer count, even if its version is a lower one."""
        return (self.lease, self.policy.number) < (announcement.lease, announcement.identity.number)

    async def take(self) -> Holding | None:
        is_rollout = self.stage is Stage.TICKETS
        delivery = await self.worker.take(self.stage, self.policy.number if is_rollout else None)
        if delivery is None:
            return None
        message = decode(delivery.payload, Ticket if is_rollout else RolloutGroup)
        assert isinstance(message, Ticket | RolloutGroup)
        holding = Holding(delivery, message, self.policy)
        self.holds.append(holding)
        return holding

    async def publish(self, holding: Holding, values: Sequence[float | None]) -> bool:
        """Hand the result over: tokens of the weights at the start and of those at the end, or scores."""
        self.holds.remove(holding)
        if isinstance(holding.message, Ticket):
            spans = (VersionSpan(holding.policy, 0, 1), VersionSpan(self.policy, 1, 2))
            completion = Completion(pack_int32([5, 6]), b"\x01\x01", pack_float32([-0.5, -0.5]), spans, "5", "stop")
            group = RolloutGroup(holding.message, (completion,) * len(holding.message.seeds), "server", 1.0, 2.0)
            return await self.worker.hand_over(holding.delivery, group, Stage.ROLLOUTS)
        scores = tuple(Score(None, "it raised") if value is None else Score(value) for value in values)
        return await self.worker.hand_over(holding.delivery, ScoredGroup(holding.message, scores), Stage.SCORED)


class _DrainedError(Exception):
    """The trainer's worker has taken what it was to take."""


class _TrainerWorker(Worker):
    """Ends the consumer's endless loop after some groups, instead of waiting for more."""

    num_allowed = 0

    async def take(self, stage: Stage, held_version: int | None = None) -> Delivery | None:
        if self.num_allowed == 0:
            raise _DrainedError
        self.num_allowed -= 1
        return await super().take(stage, held_version)

    async def wait(self, *stages: Stage, timeout_seconds: float) -> None:
        raise _DrainedError


class TrainerLife:
    """One process of the trainer, from its lease to its loss. The order of its steps is that of `loop`."""

    def __init__(self, trainer_queue: TrainerQueue, config: Config, *, batch_size: int, dynamic_sampling: bool) -> None:
        self.queue = trainer_queue
        self.max_staleness = config.staleness.max_staleness
        self.draws = Draws(PROMPTS, Sampling(1.0, 4, (2,)), config)
        self.credits = (self.max_staleness + 1) * batch_size
        self.book = TicketBook(TicketLimits(batch_size, self.credits, self.draws.num_draws))
        self.worker = _TrainerWorker(trainer_queue.queue, "trainer", config.staleness, take_over=True)
        self.consumer = Consumer(
            trainer_queue,
            self.worker,
            self.book,
            self.draws,
            Evaluation((), (2,), trainer_queue.lease.number, config),
            TrainerMetrics(),
            has_gradient=lambda group: varies([score.value for score in group.scores]),
            dynamic_sampling=dynamic_sampling,
            max_staleness=self.max_staleness,
        )
        self.version = 0
        self.untrained: list[Arrival] | None = None
        """A committed batch whose update has not ended."""
        self.release: tuple[Announcement, int] | None = None
        """Weights that are recorded and not announced, and the steps that they include."""

    async def begin(self, ledger: LedgerState, bits: int) -> None:
        """Replay the ledger, as `loop._begin` does: the weights are recorded again where their bits differ."""
        if ledger.run is None:
            await self.queue.append(RunRecord("d" * 16, len(PROMPTS), 1, 2, 0))
        self.version = len(ledger.steps)
        self.consumer.policies.update(ledger.policies)
        await restore_tickets(
            self.queue, self.book, self.draws, ledger, steps=self.version, version=self.version,
            max_staleness=self.max_staleness,
        )  # fmt: skip
        if (announced := await self.queue.queue.announced()) is not None:
            self.consumer.announced_version = announced.identity.number
        self.consumer.tickets_known.set()
        await self._record(weights(self.version, bits), len(ledger.steps))

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
        await self.queue.commit_step(record, {each.number: each.delivery.entry_id for each in batch})
        self.book.commit(numbers)
        self.consumer.release(batch)
        self.untrained = batch
        return batch

    async def finish_update(self, bits: int) -> None:
        self.untrained = None
        self.version += 1
        await self._record(weights(self.version, bits), self.book.num_steps)

    async def announce(self) -> None:
        """What `Releases.publish` does once the push has ended."""
        assert self.release is not None
        announcement, num_steps = self.release
        self.release = None
        resolved = self.book.announce(num_steps)
        self.consumer.announced_version = announcement.identity.number
        tickets = [
            self.draws.ticket(number, attempt=0, policy_version=announcement.identity.number)
            for number in self.book.issue()
        ]
        await self.queue.issue(tickets, announcement, resolved)

    async def checkpoint(self) -> None:
        steps = self.book.num_steps
        await self.queue.append(CheckpointRecord(steps, f"{steps}.{self.queue.lease.number}"))

    async def _record(self, identity: PolicyIdentity, num_steps: int) -> None:
        if self.consumer.policies.get(identity.number) != identity:
            self.consumer.policies[identity.number] = identity
            await self.queue.append(WeightsRecord(identity, num_steps))
        self.release = (Announcement(identity, "/weights", self.queue.lease.number), num_steps)


def lease_of(file: str) -> int:
    """The lease of the trainer that wrote a step file."""
    return int(file.split(".")[1])


async def next_life(
    queue: Queue, config: Config, *, batch_size: int, dynamic_sampling: bool, above: int
) -> TrainerLife:
    """A trainer that holds the lease, since the one before it counts as expired; `above`: the highest in its files."""
    await queue.client.delete(queue.keys.lease)
    lease = await acquire_lease(queue, config, above=above)
    return TrainerLife(TrainerQueue(queue, lease), config, batch_size=batch_size, dynamic_sampling=dynamic_sampling)


@dataclass(frozen=True)
class Entry:
    """One message in a stream."""

    stage: Stage
    entry_id: str
    fields: dict[bytes, bytes]

    @property
    def ticket(self) -> int:
        return int(self.fields[b"t"])

    @property
    def place(self) -> str:
        return f"{self.stage}|{self.entry_id}|{self.fields[b'a'].decode()}"


WORK = (Stage.TICKETS, Stage.ROLLOUTS, Stage.SCORED)


async def entries_of(queue: Queue) -> list[Entry]:
    """Everything in the streams of work."""
    async with queue.client.pipeline(transaction=False) as pipeline:
        for stage in WORK:
            pipeline.xrange(queue.keys.stream(stage))
        found: list[Any] = await pipeline.execute()
    return [
        Entry(stage, entry_id.decode(), fields)
        for stage, entries in zip(WORK, found, strict=True)
        for entry_id, fields in entries
    ]


async def holder_of(queue: Queue, delivery: Delivery) -> str | None:
    """The consumer that an entry is pending for."""
    stream, entry = queue.keys.stream(delivery.stage), delivery.entry_id
    pending: Any = await queue.client.xpending_range(stream, GROUP, min=entry, max=entry, count=1)
    return pending[0]["consumer"].decode() if pending else None


async def age(queue: Queue, delivery: Delivery, milliseconds: int) -> None:
    """Make an entry look as if its holder had not renewed it for so long."""
    if (holder := await holder_of(queue, delivery)) is not None:
        stream = queue.keys.stream(delivery.stage)
        await queue.client.xclaim(
            stream, GROUP, holder, min_idle_time=0, message_ids=[delivery.entry_id], idle=milliseconds, justid=True
        )


async def age_all(queue: Queue, milliseconds: int) -> None:
    """Make every entry that somebody holds look so."""
    for stage in WORK:
        stream = queue.keys.stream(stage)
        pending: Any = await queue.client.xpending_range(stream, GROUP, min="-", max="+", count=1000)
        for each in pending:
            holder, entry = each["consumer"].decode(), each["message_id"]
            await queue.client.xclaim(stream, GROUP, holder, 0, [entry], idle=milliseconds, justid=True)


async def copy_keys(queue: Queue) -> dict[bytes, bytes]:
    """All of a run's keys as the server would write them to its disk."""
    keys = [key async for key in queue.client.scan_iter(match=queue.keys.pattern, count=500)]
    async with queue.client.pipeline(transaction=True) as pipeline:
        for key in keys:
            pipeline.dump(key)
        dumped = await pipeline.execute()
    return {key: data for key, data in zip(keys, dumped, strict=True) if data is not None}


async def put_back_keys(queue: Queue, copy: dict[bytes, bytes]) -> None:
    """The server lost everything that was written after `copy` was made."""
    await queue.delete_run()
    async with queue.client.pipeline(transaction=True) as pipeline:
        for key, data in copy.items():
            pipeline.restore(key, 0, data)
        await pipeline.execute()


def without_waiting(config: Config, *, max_staleness: int) -> Config:
    """Nobody dies and nothing is free because time went by."""
    staleness = replace_section(
        config.staleness, heartbeat_seconds=3600, claim_idle_seconds=3600, max_staleness=max_staleness
    )
    return config.model_copy(update={"staleness": staleness, "actor": replace_section(config.actor, group_size=2)})


def replace_section(section: Any, **changes: Any) -> Any:
    return section.model_copy(update=changes)
