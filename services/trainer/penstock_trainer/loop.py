"""The training loop: batch, gradient, commit, change, publish.

Owns the order of these steps, on which exactly-once rests: the batch is durable before the ledger names it; the ledger
names it before its groups leave the queue and before the weights change; weights are recorded before they are pushed
and before the next step is committed. If trainer and engines take turns on the GPUs (`turns`), the trainer's turn lasts
from the complete batch until its weights are recorded.

    batch      wait for B scored groups
    gradient   forward and backward, which change nothing      (meanwhile: the groups are written to the step file, the
    commit     the ledger names the step, its groups leave       last step's weights recorded, this step committed)
    change     the optimizer's step
    publish    stage, record, push and announce the new weights, while the loop waits for the next batch (beside it, the
               log-ratios of the step are written)

Back-pressure: tickets are issued by credits only; one version is pushed at a time; a step is committed only after the
weights of the previous step are recorded.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from penstock.contracts import ScoredGroup
from penstock.contracts.ledger import StepRecord
from penstock_trainer.checkpoints.history import History
from penstock_trainer.control import Requests, first_of
from penstock_trainer.early_stop import EarlyStop
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.non_finite import NonFiniteSteps
from penstock_trainer.learner.update import StepResult
from penstock_trainer.releases import Releases
from penstock_trainer.reports import Reports
from penstock_trainer.resume import ResumePoint
from penstock_trainer.rollouts.consumer import Arrival, Consumer
from penstock_trainer.telemetry.status import TRAINING
from penstock_trainer.telemetry.step_clock import Clock
from penstock_trainer.weight_sync.turns import Turns

T = TypeVar("T")


class Trainer:
    """One life of the trainer."""

    def __init__(
        self,
        learner: Learner,
        rollouts: Consumer,
        releases: Releases,
        history: History,
        reports: Reports,
        requests: Requests,
        non_finite: NonFiniteSteps,
        early_stop: EarlyStop,
        turns: Turns | None = None,
    ) -> None:
        self._learner = learner
        self._rollouts = rollouts
        self._releases = releases
        self._history = history
        self._reports = reports
        self._requests = requests
        self._non_finite = non_finite
        self._early_stop = early_stop
        self._turns = turns
        self._version = 0

    async def train(self, start: ResumePoint) -> None:
        """Train from `start`, the position after the resume, to the end of the draws or a request to stop."""
        self._version = start.version
        self._non_finite.begin(self._reports.non_finite_in_a_row)
        self._early_stop.restore(self._history.early_stop)
        await self._releases.begin(start.steps, start.version)
        self._reports.ready()
        if self._history.is_evaluated_due():  # an earlier life may have ended before it had written it
            await self._checkpoint()
        async with asyncio.TaskGroup() as beside:
            await self._train_batches(beside)
        self._reports.evals()  # also at a stop: the queue has them no more
        if not self._requests.stop.is_set():
            await self._history.require_a_step(self._rollouts.last_failure)
            self._non_finite.finish()
            await self._evaluate_and_save()
        self._reports.ending("writing a checkpoint")
        await self._checkpoint()
        with self._reports.computing():
            await self._history.checkpoints_written()
        self._releases.close()
        self._reports.ending("all is written")

    async def _train_batches(self, beside: asyncio.TaskGroup) -> None:
        clock = Clock()
        while (batch := await self._wait_for_batch()) is not None:
            clock.lap("wait")
            await self._step(batch, clock, beside)
            clock = Clock()
            await self._checkpoint_if_due(clock)
        clock.lap("wait")
        self._reports.ending("pushing the last weights")
        with self._reports.idle():
            await self._releases.drained()
        clock.lap("push_wait")
        self._releases.take_seconds(clock.seconds["push_wait"])

    async def _wait_for_batch(self) -> list[Arrival] | None:
        """The next batch; None if nothing is left to train or the run must stop."""
        self._reports.phase("waiting for a batch")
        while not (self._requests.stop.is_set() or self._rollouts.finished):
            self._rollouts.changed.clear()
            self._reports.evals()
            if await self._early_stop.decided():
                return None
            batch = await self._rollouts.next_batch(self._version)
            if batch is not None:
                return batch
            with self._reports.idle():
                await first_of(self._rollouts.changed, self._requests.stop)
            self._reports.progress()
        return None

    async def _step(self, batch: list[Arrival], clock: Clock, beside: asyncio.TaskGroup) -> None:
        self._reports.phase(TRAINING)
        groups = [arrival.group for arrival in batch]
        if self._turns is not None:
            await self._take_turn(self._turns, clock)
        committing = beside.create_task(self._commit(batch, groups))
        if not self._learner.reads_beside_gradient:
            with self._reports.idle():
                await self._releases.staged()
            clock.lap("push_wait")
        pending = await self._compute(
            lambda: self._learner.begin(groups, version=self._version, max_lag=self._history.max_lag)
        )
        clock.lap("update")
        with self._reports.idle():
            await self._releases.staged()
        clock.lap("push_wait")
        record = await committing
        clock.lap("commit")
        result = await self._compute(pending.finish)
        clock.lap("update")

        before, self._version = self._version, self._version + int(result.changed)
        clock.note(self._releases.take_seconds(clock.seconds["push_wait"]), self._releases.take_pushes())
        self._releases.publish_beside(beside, record, self._version, changed=result.changed)
        beside.create_task(self._write_log_ratios(record, groups, result, before))
        self._reports.step(record.step, groups, clock, result, (before, self._version))
        self._non_finite.note(record.step, result)

    async def _take_turn(self, turns: Turns, clock: Clock) -> None:
        self._reports.phase("waiting for the engines to leave the GPUs")
        with self._reports.idle():
            await self._releases.drained()
            await self._releases.evaluated()
            clock.lap("push_wait")
            await turns.take()
        clock.lap("take_turn")
        self._reports.phase(TRAINING)

    async def _commit(self, batch: Sequence[Arrival], groups: Sequence[ScoredGroup]) -> StepRecord:
        """Write the batch, and commit its step after the weights of the previous step are recorded."""
        record = await self._history.write_batch(groups, self._version)
        await self._releases.staged()
        await self._history.commit(record, {each.number: each.delivery for each in batch})
        self._rollouts.release(batch)
        return record

    async def _write_log_ratios(
        self, record: StepRecord, groups: Sequence[ScoredGroup], result: StepResult, version: int
    ) -> None:
        def write() -> None:
            values = result.log_ratios.by_trajectory(groups, version=version, max_lag=record.max_lag)
            self._history.write_log_ratios(record, values)

        await asyncio.to_thread(write)

    async def _compute(self, work: Callable[[], T]) -> T:
        """Run the trainer's own work in a thread."""
        with self._reports.computing():
            return await asyncio.to_thread(work)

    async def _checkpoint_if_due(self, clock: Clock) -> None:
        if not (self._requests.checkpoint or self._history.is_checkpoint_due()):
            return
        self._requests.checkpoint = False
        self._reports.phase("writing a checkpoint")
        with self._reports.idle():
            await self._releases.staged()
        clock.lap("push_wait")
        await self._checkpoint()
        clock.leave_out()  # it has a metric of its own

    async def _checkpoint(self) -> None:
        with self._reports.computing():
            await self._history.checkpoint(self._version)

    async def _evaluate_and_save(self) -> None:
        """Evaluate the final weights, and save them as a Hugging Face folder."""
        self._reports.ending("evaluating the final weights")
        await self._releases.evaluate(self._history.num_steps)
        while self._rollouts.is_evaluating:
            self._rollouts.changed.clear()
            self._reports.evals()
            if self._rollouts.is_evaluating:
                await self._rollouts.changed.wait()
                self._reports.progress()
        self._reports.evals()
        self._reports.ending("saving the model")
        await self._compute(lambda: self._learner.save_pretrained(self._history.final_folder, self._history.num_steps))
