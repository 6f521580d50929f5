"""The training loop: wait for a batch, commit it, update, stage, submit; and what comes before and after.

Owns the order of these steps, on which exactly-once rests: the step file is durable before the ledger names it, the
ledger names it before its groups leave the queue, weights are recorded before they are pushed. Called by `wiring`.

      tickets <---------------- issue ----------------+
         |                                            |
      rollout -> reward -> scored -> consumer -> [batch] -> commit -> update -> stage -> releases -> servers
                                        ^                                                   |
     back-pressure: credits only        '---- a batch waits here until its turn             '- one push at a time
"""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

from penstock.broker import Announcement
from penstock.broker.trainer import TrainerQueue
from penstock.canary import Canary
from penstock.config import Config
from penstock.contracts import PolicyIdentity
from penstock.errors import StallError, WeightsError
from penstock.ledger import RunRecord, StepRecord, WeightsRecord
from penstock.tickets import TicketBook
from penstock_trainer.canary import CanaryMaker
from penstock_trainer.checkpoint import CheckpointMeta, Checkpoints
from penstock_trainer.checkpoint_writer import CheckpointWriter
from penstock_trainer.consumer import Arrival, Consumer
from penstock_trainer.draws import Draws
from penstock_trainer.evaluation import Evaluation
from penstock_trainer.learner import Learner
from penstock_trainer.metrics import TrainerMetrics
from penstock_trainer.reconcile import restore_tickets
from penstock_trainer.releases import Release, Releases
from penstock_trainer.reports import Clock, Reports
from penstock_trainer.resume import Replayed, check_same_run, newest_checkpoint, restore
from penstock_trainer.status import Status
from penstock_trainer.step_files import StepFiles
from penstock_trainer.transport import Transport
from penstock_trainer.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass
class Requests:
    """What HTTP and signals ask of the loop."""

    stop: asyncio.Event
    checkpoint: bool = False


@dataclass(frozen=True)
class Parts:
    """Everything that the loop drives, made by `wiring`."""

    config: Config
    trainer_queue: TrainerQueue
    book: TicketBook
    draws: Draws
    consumer: Consumer
    evaluation: Evaluation
    releases: Releases
    learner: Learner
    transport: Transport
    canary: CanaryMaker
    step_files: StepFiles
    checkpoints: Checkpoints
    checkpoint_writer: CheckpointWriter
    reports: Reports
    status: Status
    watchdog: Watchdog
    metrics: TrainerMetrics
    run_record: RunRecord
    final_folder: Path


class Trainer:
    """One life of the trainer."""

    def __init__(self, parts: Parts, requests: Requests) -> None:
        self._parts = parts
        self._requests = requests
        self._version = 0
        self._identity = PolicyIdentity(0, "")
        self._canary: Canary | None = None
        self._last_checkpoint = -1

    async def train(self) -> None:
        """From start or resume to the end of the draws, or until asked to stop."""
        await self._begin()
        clock = Clock()
        while (batch := await self._wait_for_batch()) is not None:
            clock.lap("wait")
            await self._step(batch, clock)
            clock = Clock()
        await self._parts.releases.drained()
        if not self._requests.stop.is_set():
            await self._require_a_step()
            await self._finish()
        self._set_phase("writing a checkpoint")
        await self._checkpoint()
        with self._parts.watchdog.computing():
            await self._parts.checkpoint_writer.drained()
        self._parts.transport.close()
        self._set_phase("finished")

    async def _begin(self) -> None:
        parts = self._parts
        self._set_phase("resuming")
        ledger = await parts.trainer_queue.ledger()
        check_same_run(ledger, parts.run_record)
        if ledger.run is None:
            await parts.trainer_queue.append(parts.run_record)
        announced = await parts.trainer_queue.queue.announced()
        parts.transport.prune({announced.identity.number} if announced else set())
        replayed: list[Replayed] = []
        told = parts.status.progress.knows
        with parts.watchdog.computing():
            position = await asyncio.to_thread(
                restore,
                parts.learner,
                ledger,
                parts.checkpoints,
                parts.step_files,
                parts.transport.digest,
                lambda each: None if told(each.step) else replayed.append(each),
            )
        parts.reports.resumed(position.steps, replayed)
        self._version = parts.status.version = position.version
        parts.status.steps = position.steps
        newest = newest_checkpoint(ledger, parts.checkpoints)
        self._last_checkpoint = newest.steps if newest else -1
        parts.consumer.policies.update(ledger.policies)
        lost = await restore_tickets(
            parts.trainer_queue,
            parts.book,
            parts.draws,
            ledger,
            steps=position.steps,
            version=position.version,
            max_staleness=parts.config.staleness.max_staleness,
        )
        parts.metrics.queue.tickets.labels(state="reissued", reason="lost").inc(len(lost))
        if announced is not None:  # until the next one is: what a drop lets out carries it
            parts.consumer.announced_version = announced.identity.number
        parts.consumer.tickets_known.set()
        release = await self._stage(position.steps, changed=True)
        if ledger.policies.get(self._version) != self._identity:
            await self._record_weights(release)
        await asyncio.to_thread(parts.step_files.journal.begin, await parts.trainer_queue.ledger())
        await parts.releases.publish(release)
        parts.status.ready = True

    async def _wait_for_batch(self) -> list[Arrival] | None:
        """The next batch; None when nothing is left to train or the run is to stop."""
        parts = self._parts
        self._set_phase("waiting for a batch")
        stopping = asyncio.create_task(self._requests.stop.wait())
        try:
            while not (self._requests.stop.is_set() or parts.book.finished):
                parts.consumer.changed.clear()
                batch = await parts.consumer.next_batch(self._version)
                parts.reports.evals()
                if batch is not None:
                    return batch
                changed = asyncio.create_task(parts.consumer.changed.wait())
                with parts.metrics.idle.counting():
                    await asyncio.wait({changed, stopping}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                parts.watchdog.progress()
        finally:
            stopping.cancel()
        return None

    async def _step(self, batch: list[Arrival], clock: Clock) -> None:
        parts = self._parts
        version_before = self._version
        self._set_phase("training")
        groups = [arrival.group for arrival in batch]
        step = parts.book.num_steps
        max_lag = parts.config.staleness.max_lag
        lease = parts.trainer_queue.lease.number
        record = await asyncio.to_thread(
            parts.step_files.write, step, lease, groups, version=version_before, max_lag=max_lag
        )
        await parts.trainer_queue.commit_step(record, {each.number: each.delivery.entry_id for each in batch})
        parts.book.commit([each.number for each in batch])
        parts.consumer.release(batch)
        clock.lap("commit")
        with parts.watchdog.computing():
            result = await asyncio.to_thread(parts.learner.update, groups, version=version_before, max_lag=max_lag)
        clock.lap("update")
        parts.watchdog.progress()
        self._version += int(result.changed)
        with parts.metrics.idle.counting():
            await parts.releases.drained()
        clock.lap("push_wait")
        release = await self._stage(step + 1, changed=result.changed)
        await self._record_weights(release, record)
        await parts.releases.submit(release)
        clock.lap("stage")
        clock.note(parts.releases.take_seconds(clock.seconds["push_wait"] + clock.seconds["stage"]))
        parts.reports.step(step, groups, clock, result, (version_before, self._version))
        await self._maintain()

    async def _stage(self, num_steps: int, *, changed: bool) -> Release:
        """Write the weights where servers find them; nothing to do after a step that changed none."""
        parts = self._parts
        lease = parts.trainer_queue.lease.number
        if changed:
            with parts.watchdog.computing():
                self._identity = await asyncio.to_thread(parts.transport.stage, self._version, lease)
                self._canary = await asyncio.to_thread(parts.canary.make, self._version)
        path = str(parts.transport.folder_of(self._version, lease))
        parts.consumer.policies[self._version] = self._identity
        parts.status.version, parts.status.version_digest = self._version, self._identity.digest
        parts.metrics.policy_version.set(self._version)
        return Release(Announcement(self._identity, path, lease, self._canary), num_steps, changed)

    async def _record_weights(self, release: Release, step: StepRecord | None = None) -> None:
        """Append the weights to the ledger, and after a step both to the journal."""
        parts = self._parts
        known = parts.consumer.policies.get(self._version)
        if known != release.announcement.identity:
            raise WeightsError(f"version {self._version} is {known} and {release.announcement.identity}: expected one")
        record = WeightsRecord(
            release.announcement.identity,
            release.num_steps,
            release.changed,
            parts.learner.num_ranks,
            parts.learner.device,
        )
        await parts.trainer_queue.append(record)
        if step is not None:
            await asyncio.to_thread(parts.step_files.journal.append, step, record)

    async def _maintain(self) -> None:
        every = self._parts.config.checkpoint.every_steps
        steps = self._parts.book.num_steps
        if self._requests.checkpoint or (every and steps % every == 0):
            self._requests.checkpoint = False
            await self._checkpoint()

    async def _checkpoint(self) -> None:
        parts = self._parts
        steps = parts.book.num_steps
        if steps == self._last_checkpoint:
            return
        meta = CheckpointMeta(
            steps=steps,
            version=self._version,
            lease=parts.trainer_queue.lease.number,
            next_number=parts.book.next_number,
            outstanding=tuple(parts.book.outstanding),
        )
        with parts.watchdog.computing():
            await parts.checkpoint_writer.save(meta)
        self._last_checkpoint = steps

    async def _require_a_step(self) -> None:
        """StallError where every ticket was dropped: a run that trained nothing has not succeeded."""
        parts = self._parts
        if parts.book.num_steps:
            return
        counters = await parts.trainer_queue.counters()
        dropped = ", ".join(f"{count} {reason}" for reason, count in counters.dropped.items())
        raise StallError(
            f"the run ended without a step: all its tickets were dropped ({dropped}); expected groups with rewards; "
            f"the last one: {parts.consumer.last_failure or 'no reason is known, see the logs of the services'}"
        )

    async def _finish(self) -> None:
        """Final evaluation, and the weights as a Hugging Face folder."""
        parts = self._parts
        self._set_phase("evaluating the final weights")
        await parts.releases.evaluate(parts.book.num_steps, self._version)
        while parts.evaluation.num_waiting:
            parts.consumer.changed.clear()
            parts.reports.evals()
            if parts.evaluation.num_waiting:
                await parts.consumer.changed.wait()
                parts.watchdog.progress()
        parts.reports.evals()
        self._set_phase("saving the model")
        with parts.watchdog.computing():
            await asyncio.to_thread(parts.learner.save_pretrained, parts.final_folder)

    def _set_phase(self, phase: str) -> None:
        self._parts.status.phase = phase
