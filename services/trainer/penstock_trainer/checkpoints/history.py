"""The durable record of a run: the order in which batches, steps, weights and checkpoints are written.

Owns that order, on which exactly-once rests. Invariants: a step file is flushed before the ledger names it; the ledger
names a step before its groups leave the queue; the journal follows the ledger; a checkpoint is of weights that the
ledger names. So a ledger that the queue has lost is written again from the journal.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from penstock.broker import Delivery, Queue
from penstock.broker.trainer import TrainerQueue, first_record
from penstock.config.changes import Change, change_of, differences, settings_of
from penstock.contracts import ScoredGroup
from penstock.contracts.ledger import (
    ArchivedRecord,
    CheckpointRecord,
    DropRecord,
    EarlyStopRecord,
    LedgerState,
    Record,
    RunRecord,
    StepRecord,
    WeightsRecord,
    replay,
)
from penstock.errors import DataError, PenstockError, StallError
from penstock.records.step_numbers import number_of
from penstock.tickets import TicketBook
from penstock_trainer.checkpoints.folders import CheckpointMeta, Checkpoints
from penstock_trainer.checkpoints.journal import Journal
from penstock_trainer.checkpoints.same_run import check_same_run
from penstock_trainer.checkpoints.settings import StepConfigs
from penstock_trainer.checkpoints.step_files import StepFiles
from penstock_trainer.checkpoints.writer import CheckpointWriter
from penstock_trainer.data.drawing.draws import Draws

log = logging.getLogger(__name__)

KEPT_STEPS = 1000  # of which the ledger has all records: more than can wait for an announcement, soon read

HOLDS_FROM = {
    Change.FIXED: "its content is the same",
    Change.NEXT_STEP: "the new value holds from step {} on",
    Change.FREE: "the new value holds at once",
}


class History:
    """The record of one run, in its queue and in its folder.

    record = await history.write_batch(groups, version=7)    the step file is on the disk
    await history.commit(record, deliveries)                 the ledger names the step
    await history.record_weights(weights, record)            and then its weights
    """

    def __init__(
        self,
        queue: TrainerQueue,
        book: TicketBook,
        step_files: StepFiles,
        checkpoints: Checkpoints,
        writer: CheckpointWriter,
        run: RunRecord,
        configs: StepConfigs,
        draws: Draws,
        *,
        final_folder: Path,
    ) -> None:
        """run: as this configuration would begin it, without its model. final_folder: for the trained weights."""
        self._queue = queue
        self._book = book
        self.step_files = step_files
        self.checkpoints = checkpoints
        self._writer = writer
        self._run = run
        self._draws = draws
        self.configs = configs
        self.max_lag = configs.config.staleness.max_lag
        """Tokens that are staler are masked, in each step that is written."""
        checkpoint = configs.config.checkpoint
        self._checkpoint_every = checkpoint.every_steps
        self._keep_evaluated = configs.config.eval.every_steps if checkpoint.keep_best else 0
        self.final_folder = final_folder
        self._num_archived = 0
        self._last_checkpoint = -1
        self._settings = ""
        self._unfinished: StepRecord | None = None
        self.early_stop: EarlyStopRecord | None = None
        """The decision of an earlier life to end the run."""
        # A drop must not be added to a journal that is being replaced by an older state of the ledger.
        self._journaling = asyncio.Lock()

    @property
    def num_steps(self) -> int:
        """Steps that are committed."""
        return self._book.num_steps

    async def open(self, model: str) -> LedgerState:
        """The ledger of this run, begun if it is new; ConfigError if it belongs to another run.

        model: fingerprint of the weights of actor.path.
        """
        run = msgspec.structs.replace(self._run, model=model)
        ledger = await self._queue.ledger()
        if ledger.run is None and await asyncio.to_thread(self._is_lost):
            ledger = await self._rebuild(run)
        elif ledger.run is None:
            await self._queue.append(run)
        else:
            check_same_run(ledger.run, run)
        self._num_archived = ledger.archived.num_steps if ledger.archived is not None else 0
        newest = newest_checkpoint(ledger, self.checkpoints)
        if newest is None or self._draws.needs_all_steps:  # it begins with the first step
            ledger = await asyncio.to_thread(self.step_files.journal.with_archive, ledger)
        self._last_checkpoint = newest.steps if newest else -1
        self._settings = await asyncio.to_thread(self.step_files.settings.write, self.configs.config)
        await asyncio.to_thread(self._report_changes, ledger)
        self._unfinished = ledger.unfinished
        self.early_stop = ledger.early_stop
        return ledger

    def _is_lost(self) -> bool:
        """Whether the folder holds a run, which the queue lacks. DataError if nothing says how far it had come."""
        if self.step_files.journal.exists and self.step_files.journal.records():
            return True
        names = self.checkpoints.names()
        held = f"checkpoint {names[-1]}" if names else "step files"
        if names or not self.step_files.is_empty:
            raise DataError(
                f"the queue holds nothing of this run, and its folder holds {held} but no record in "
                f"{self.step_files.journal.path}: expected one of both, to go on. Restore the data of the queue; or "
                "choose another run.name, and begin with the newest checkpoint (`penstock export`) as actor.path"
            )
        return False

    async def _rebuild(self, run: RunRecord) -> LedgerState:
        """Write the lost ledger again, from the journal."""
        journal = self.step_files.journal
        records = await asyncio.to_thread(journal.records)
        state = replay(records)
        if state.run is None:
            raise DataError(f"{journal.path} has no record of the run: expected the one that begins it")
        check_same_run(state.run, run)
        log.warning(
            "the queue has lost all data of this run: its ledger is rebuilt from %s, with %d steps, %d dropped "
            "tickets and %d checkpoints; lost are outstanding tickets and their groups (they are issued again), "
            "evaluations that had not ended, and dead letters",
            journal.path,
            state.num_steps,
            sum(state.num_dropped.values()),
            len(state.checkpoints),
        )
        return await self._queue.rebuild(records)

    def _report_changes(self, ledger: LedgerState) -> None:
        """Log each key whose value is not that of the last step."""
        last = ledger.steps[-1] if ledger.steps else None
        if last is None or not last.settings:
            return
        try:
            before = self.step_files.settings.read(last.settings)
        except DataError as error:  # needed only if the step is trained again
            log.warning("which keys have changed cannot be told: %s", error)
            return
        next_step = last.step if last is ledger.unfinished else last.step + 1
        for key, old, new in differences(before, settings_of(self.configs.config)):
            holds = HOLDS_FROM[change_of(key)].format(number_of(next_step))
            log.warning("%s was %r and is %r: %s", key, old, new, holds)

    async def begin_journal(self) -> None:
        """Write the journal anew from the ledger; later records follow it."""
        async with self._journaling:
            await asyncio.to_thread(self.step_files.journal.begin, await self._queue.ledger())

    async def drop(self, record: DropRecord, delivery: Delivery | None) -> None:
        """End a ticket without a step: ticket and reason in the ledger, then in the journal."""
        async with self._journaling:
            await self._queue.drop(record, delivery)
            self._draws.dropped(record)
            # Flushed with the next step: a ticket whose end is lost with the queue and the host is drawn again.
            await asyncio.to_thread(self.step_files.journal.append, record, durable=False)

    async def write_batch(self, groups: Sequence[ScoredGroup], version: int) -> StepRecord:
        """Write the next step's groups durably; the record commits them. `version`: of the weights that they train."""
        lease = self._queue.lease.number
        return await asyncio.to_thread(
            self.step_files.write,
            self.num_steps,
            lease,
            groups,
            version=version,
            max_lag=self.max_lag,
            settings=self._settings,
            outcomes=self._draws.outcomes(groups),
        )

    async def commit(self, record: StepRecord, deliveries: Mapping[int, Delivery]) -> None:
        """Commit a step whose batch is written: ticket number -> the entry that leaves the queue.

        A crash before this changes nothing: the groups are in the queue, and the ledger does not name the file.
        """
        await self._queue.commit_step(record, dict(deliveries))
        self._draws.committed(record)
        self._book.commit(list(deliveries))

    def write_log_ratios(self, record: StepRecord, groups: tuple[tuple[bytes, ...], ...]) -> None:
        """Write the log-ratios of a committed step; if that fails, the run goes on. Blocking."""
        try:
            self.step_files.write_log_ratios(record, groups)
        except PenstockError as error:
            log.warning("the log-ratios of step %d are not recorded: %s", record.number, error)

    def is_unfinished(self, num_steps: int) -> bool:
        """Whether an earlier life committed the last of these steps and did not record the weights after it."""
        return self._unfinished is not None and self._unfinished.step + 1 == num_steps

    async def record_weights(self, record: WeightsRecord, step: StepRecord | None) -> None:
        """Name the weights in the ledger; after a step, step and weights in the journal."""
        if self.is_unfinished(record.steps):
            record = msgspec.structs.replace(record, settings=self._settings)
        await self._queue.append(record)
        if step is not None:
            await asyncio.to_thread(self.step_files.journal.append, step, record)

    def is_checkpoint_due(self) -> bool:
        """Whether a checkpoint is due by checkpoint.every_steps, or since these weights are evaluated."""
        every = self._checkpoint_every
        return (bool(every) and self.num_steps % every == 0) or self.is_evaluated_due()

    def is_evaluated_due(self) -> bool:
        """Whether the present weights were trained, are evaluated, and may be the best: checkpoint.keep_best."""
        every = self._keep_evaluated
        return bool(every and self.num_steps) and self.num_steps % every == 0

    async def checkpoint(self, version: int) -> None:
        """Copy the state after the last step, unless a checkpoint has it; it is written while training goes on."""
        if self.num_steps == self._last_checkpoint:
            return
        await self._writer.drained()
        await self._archive()
        meta = CheckpointMeta(
            steps=self.num_steps,
            version=version,
            lease=self._queue.lease.number,
            next_number=self._book.next_number,
            outstanding=tuple(self._book.outstanding),
        )
        await self._writer.save(meta)
        self._last_checkpoint = meta.steps

    async def _archive(self) -> None:
        """Move records that no resume needs from the ledger to the archive, once it is worth the while.

        A resume needs those after the oldest checkpoint. The last ones stay, too: tokens by their weights may arrive,
        and their tickets may wait for the announcement of their weights.
        """
        if self.num_steps - self._num_archived < 2 * KEPT_STEPS:
            return
        journal = self.step_files.journal
        async with self._journaling:
            ledger = await self._queue.ledger()
            existing = [each for each in ledger.checkpoints if self.checkpoints.exists(each)]
            needed = self.checkpoints.newest(existing)  # no resume begins with one that is kept as the best
            before_step = min(self.num_steps - KEPT_STEPS, min([each.steps for each in needed], default=0))
            if before_step - self._num_archived < KEPT_STEPS:
                return
            after = ledger.archived.num_bytes if ledger.archived is not None else 0

            async def write(records: Sequence[Record]) -> int:
                return await asyncio.to_thread(journal.archive, records, after)

            await self._queue.archive(before_step, write, exists=existing)
            self._num_archived = before_step
            await asyncio.to_thread(journal.begin, await self._queue.ledger())
        log.info("the records of the first %d steps are in the archive", before_step)

    async def end_early(self, record: EarlyStopRecord) -> None:
        """Name in the ledger that the run ends before all its steps."""
        async with self._journaling:
            await self._queue.append(record)
            await asyncio.to_thread(self.step_files.journal.append, record)

    async def checkpoints_written(self) -> None:
        """Wait until no checkpoint is being written."""
        await self._writer.drained()

    async def require_a_step(self, last_failure: str) -> None:
        """StallError if every ticket was dropped: a run that trained nothing has not succeeded."""
        if self.num_steps:
            return
        counters = await self._queue.counters()
        dropped = ", ".join(f"{count} {reason}" for reason, count in counters.dropped.items())
        raise StallError(
            f"the run ended without a step: all its tickets were dropped ({dropped}); expected groups with rewards; "
            f"the last one: {last_failure or 'no reason is known, see the logs of the services'}"
        )


async def refuse_other_run(queue: Queue, journal: Journal, current: RunRecord) -> None:
    """ConfigError, before a model is loaded, if the queue or the folder holds a run that this one cannot continue."""
    begun = await first_record(queue)
    if begun is None and journal.exists:
        begun = (await asyncio.to_thread(journal.read)).run
    if isinstance(begun, ArchivedRecord):
        begun = begun.run
    if isinstance(begun, RunRecord):
        check_same_run(begun, current)


def newest_checkpoint(ledger: LedgerState, checkpoints: Checkpoints) -> CheckpointRecord | None:
    """The newest checkpoint that the ledger names and that exists."""
    return next((record for record in reversed(ledger.checkpoints) if checkpoints.exists(record)), None)
