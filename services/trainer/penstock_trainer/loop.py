"""The training loop: wait for a batch, train it, commit it before the weights change; stage and submit beside that.

Owns the order of these steps, on which exactly-once rests: the step file is durable before the ledger names it; the
ledger names it before its groups leave the queue and before the weights change; weights are recorded before they are
pushed and before the next step is committed.

      tickets <---------------- issue ----------------+
         |                                            |
      rollout -> reward -> scored -> consumer -> [batch] -> update ------> | change -> stage -> releases -> servers
                                        ^                     commit ----> |            |
     back-pressure: credits only        |                       ^- weights of the       |- one push at a time
                                        |                          step before are      |
                                        |                          recorded             |
                                        '---- a batch waits here until its turn         '- beside the next update
"""

import asyncio
import time

from penstock.contracts import PolicyIdentity
from penstock.contracts.canary import Canary
from penstock.contracts.ledger import StepRecord, WeightsRecord
from penstock.contracts.services import Announcement
from penstock_trainer.checkpoints.folders import CheckpointMeta
from penstock_trainer.control import Requests
from penstock_trainer.gate import Gate
from penstock_trainer.learner.update import Replayed
from penstock_trainer.parts import Parts
from penstock_trainer.releases import Release
from penstock_trainer.resume import check_same_run, newest_checkpoint, restore
from penstock_trainer.rollouts.consumer import Arrival
from penstock_trainer.rollouts.reconcile import restore_tickets
from penstock_trainer.telemetry.step_clock import Clock


class Trainer:
    """One life of the trainer."""

    def __init__(self, parts: Parts, requests: Requests) -> None:
        self._parts = parts
        self._requests = requests
        self._version = 0
        self._identity = PolicyIdentity(0, "")
        self._canary: Canary | None = None
        self._last_checkpoint = -1
        self._staging: asyncio.Task[None] | None = None
        self._stage_seconds = 0.0  # of stagings that have ended since the last step was reported

    async def train(self) -> None:
        """From start or resume to the end of the draws, or until asked to stop."""
        parts = self._parts
        await self._begin()
        async with asyncio.TaskGroup() as beside:
            await self._train_batches(beside)
        if not self._requests.stop.is_set():
            await parts.watchdog.require_a_step(parts.consumer.last_failure)
            await self._finish()
        self._set_phase("writing a checkpoint")
        await self._checkpoint()
        with parts.watchdog.computing():
            await parts.checkpoint_writer.drained()
        parts.transport.close()
        self._set_phase("finished")

    async def _train_batches(self, beside: asyncio.TaskGroup) -> None:
        parts, clock = self._parts, Clock()
        while (batch := await self._wait_for_batch()) is not None:
            clock.lap("wait")
            await self._step(batch, clock, beside)
            clock = Clock()
            await self._maintain(clock)
        clock.lap("wait")
        await self._wait_for_weights(clock, pushed=True)
        parts.releases.take_seconds(clock.seconds["push_wait"])

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
        parts.versions.restore(ledger.policies)
        await restore_tickets(
            parts.trainer_queue,
            parts.book,
            parts.issuer,
            ledger,
            steps=position.steps,
            version=position.version,
            max_staleness=parts.config.staleness.max_staleness,
        )
        if announced is not None:  # until the next one is: what a drop lets out carries it
            parts.versions.announce(announced.identity)
        parts.consumer.begin()
        release = await self._stage(position.steps, changed=True)
        parts.versions.replace(self._identity)
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
                parts.changed.clear()
                batch = await parts.consumer.next_batch(self._version)
                parts.reports.evals()
                if batch is not None:
                    return batch
                changed = asyncio.create_task(parts.changed.wait())
                with parts.metrics.idle.counting():
                    await asyncio.wait({changed, stopping}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                parts.watchdog.progress()
        finally:
            stopping.cancel()
        return None

    async def _step(self, batch: list[Arrival], clock: Clock, beside: asyncio.TaskGroup) -> None:
        parts = self._parts
        version_before, step = self._version, parts.book.num_steps
        self._set_phase("training")
        groups = [arrival.group for arrival in batch]
        lease, max_lag = parts.trainer_queue.lease.number, parts.config.staleness.max_lag
        record = await asyncio.to_thread(
            parts.step_files.write, step, lease, groups, version=version_before, max_lag=max_lag
        )
        clock.lap("commit")
        gate = Gate()
        committing = beside.create_task(self._commit(batch, record, gate))
        try:
            if not parts.learner.stages_beside_update:
                await self._wait_for_weights(clock)
                await committing
                clock.lap("commit")
            with parts.watchdog.computing(waits=lambda: gate.is_waited_at):
                result = await asyncio.to_thread(
                    parts.learner.update, groups, version=version_before, max_lag=max_lag, before_change=gate.wait
                )
            clock.lap("update")
            with parts.metrics.idle.counting():
                await committing  # an update without a mini-batch did not wait for it
            clock.lap("push_wait")
        finally:
            gate.shut()
        clock.part("update", "push_wait", gate.waited_seconds)
        parts.metrics.idle.add(gate.waited_seconds)
        parts.watchdog.progress()
        self._version += int(result.changed)
        clock.note({**parts.releases.take_seconds(clock.seconds["push_wait"]), "stage": self._stage_seconds})
        self._stage_seconds = 0.0
        self._staging = beside.create_task(self._publish(record, changed=result.changed))
        parts.reports.step(step, groups, clock, result, (version_before, self._version))

    async def _commit(self, batch: list[Arrival], record: StepRecord, gate: Gate) -> None:
        """Commit a step whose file is written, once the weights of the one before are recorded; then let them change.

        A crash before the commit changes nothing: the groups are in the queue, and the ledger names no such file.
        """
        parts = self._parts
        await self._staged()
        await parts.trainer_queue.commit_step(record, {each.number: each.delivery for each in batch})
        parts.book.commit([each.number for each in batch])
        parts.consumer.release(batch)
        gate.open()

    async def _publish(self, record: StepRecord, *, changed: bool) -> None:
        """Stage, record and submit the weights of a step, while the loop goes on; pushes are one at a time."""
        parts = self._parts
        await parts.releases.drained()
        start = time.monotonic()
        release = await self._stage(record.step + 1, changed=changed)
        await self._record_weights(release, record)
        await parts.releases.submit(release)
        self._stage_seconds += time.monotonic() - start

    async def _staged(self) -> None:
        """Until the weights of the last step are staged and recorded."""
        if self._staging is not None:
            await self._staging

    async def _wait_for_weights(self, clock: Clock, *, pushed: bool = False) -> None:
        """Stand still until those of the last step are staged, or `pushed` too."""
        with self._parts.metrics.idle.counting():
            await self._staged()
            if pushed:
                await self._parts.releases.drained()
        clock.lap("push_wait")

    async def _stage(self, num_steps: int, *, changed: bool) -> Release:
        """Write the weights where servers find them; nothing to do after a step that changed none."""
        parts = self._parts
        lease = parts.trainer_queue.lease.number
        if changed:
            with parts.watchdog.computing():
                self._identity = await asyncio.to_thread(parts.transport.stage, self._version, lease)
                self._canary = await asyncio.to_thread(parts.canary.make, self._version)
        path = str(parts.transport.folder_of(self._version, lease))
        parts.status.version, parts.status.version_digest = self._version, self._identity.digest
        parts.metrics.policy_version.set(self._version)
        return Release(Announcement(self._identity, path, lease, self._canary), num_steps, changed)

    async def _record_weights(self, release: Release, step: StepRecord | None = None) -> None:
        """Append the weights to the ledger, and after a step both to the journal."""
        parts = self._parts
        parts.versions.know(release.announcement.identity)
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

    async def _maintain(self, clock: Clock) -> None:
        every = self._parts.config.checkpoint.every_steps
        steps = self._parts.book.num_steps
        if self._requests.checkpoint or (every and steps % every == 0):
            self._requests.checkpoint = False
            await self._wait_for_weights(clock)
            await self._checkpoint()
            clock.leave_out()  # it has a metric of its own

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

    async def _finish(self) -> None:
        """Final evaluation, and the weights as a Hugging Face folder."""
        parts = self._parts
        self._set_phase("evaluating the final weights")
        await parts.releases.evaluate(parts.book.num_steps, self._version)
        while parts.evaluation.num_waiting:
            parts.changed.clear()
            parts.reports.evals()
            if parts.evaluation.num_waiting:
                await parts.changed.wait()
                parts.watchdog.progress()
        parts.reports.evals()
        self._set_phase("saving the model")
        with parts.watchdog.computing():
            await asyncio.to_thread(parts.learner.save_pretrained, parts.final_folder)

    def _set_phase(self, phase: str) -> None:
        self._parts.status.phase = phase
