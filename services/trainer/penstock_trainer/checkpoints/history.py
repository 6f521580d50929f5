"""The durable record of a run: the order in which batches, steps, weights and checkpoints are written.

Owns that order, on which exactly-once rests. Invariants: a step file is flushed before the ledger names it; the ledger
names a step before its groups leave the queue; the journal follows the ledger; a checkpoint is of weights that the
ledger names.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from penstock.broker import Delivery
from penstock.broker.trainer import TrainerQueue
from penstock.contracts import ScoredGroup
from penstock.contracts.ledger import CheckpointRecord, LedgerState, RunRecord, StepRecord, WeightsRecord
from penstock.errors import ConfigError, StallError
from penstock.tickets import TicketBook
from penstock_trainer.checkpoints.folders import CheckpointMeta, Checkpoints
from penstock_trainer.checkpoints.step_files import StepFiles
from penstock_trainer.checkpoints.writer import CheckpointWriter


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
        *,
        max_lag: int | None,
        checkpoint_every: int,
        final_folder: Path,
    ) -> None:
        """max_lag: staler tokens are masked in every step. checkpoint_every: steps; 0: only on request.

        final_folder: for the weights of a run that has ended.
        """
        self._queue = queue
        self._book = book
        self.step_files = step_files
        self.checkpoints = checkpoints
        self._writer = writer
        self._run = run
        self._max_lag = max_lag
        self._checkpoint_every = checkpoint_every
        self.final_folder = final_folder
        self._last_checkpoint = -1

    @property
    def num_steps(self) -> int:
        """Steps that are committed."""
        return self._book.num_steps

    async def open(self) -> LedgerState:
        """The ledger of this run, begun if it is new; ConfigError if it belongs to another run."""
        ledger = await self._queue.ledger()
        if ledger.run is None:
            await self._queue.append(self._run)
        else:
            check_same_run(ledger.run, self._run)
        newest = newest_checkpoint(ledger, self.checkpoints)
        self._last_checkpoint = newest.steps if newest else -1
        return ledger

    async def begin_journal(self) -> None:
        """Write the journal anew from the ledger; later records follow it."""
        await asyncio.to_thread(self.step_files.journal.begin, await self._queue.ledger())

    async def write_batch(self, groups: Sequence[ScoredGroup], version: int) -> StepRecord:
        """Write the next step's groups durably; the record commits them. `version`: of the weights that they train."""
        lease = self._queue.lease.number
        return await asyncio.to_thread(
            self.step_files.write, self.num_steps, lease, groups, version=version, max_lag=self._max_lag
        )

    async def commit(self, record: StepRecord, deliveries: Mapping[int, Delivery]) -> None:
        """Commit a step whose batch is written: ticket number -> the entry that leaves the queue.

        A crash before this changes nothing: the groups are in the queue, and the ledger does not name the file.
        """
        await self._queue.commit_step(record, dict(deliveries))
        self._book.commit(list(deliveries))

    async def record_weights(self, record: WeightsRecord, step: StepRecord | None) -> None:
        """Name the weights in the ledger; after a step, step and weights in the journal."""
        await self._queue.append(record)
        if step is not None:
            await asyncio.to_thread(self.step_files.journal.append, step, record)

    def is_checkpoint_due(self) -> bool:
        """Whether a checkpoint is due by checkpoint.every_steps."""
        return bool(self._checkpoint_every) and self.num_steps % self._checkpoint_every == 0

    async def checkpoint(self, version: int) -> None:
        """Copy the state after the last step, unless a checkpoint has it; it is written while training goes on."""
        if self.num_steps == self._last_checkpoint:
            return
        meta = CheckpointMeta(
            steps=self.num_steps,
            version=version,
            lease=self._queue.lease.number,
            next_number=self._book.next_number,
            outstanding=tuple(self._book.outstanding),
        )
        await self._writer.save(meta)
        self._last_checkpoint = meta.steps

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


def check_same_run(begun: RunRecord, current: RunRecord) -> None:
    """ConfigError if a value that fixes the meaning of ticket numbers has changed since the run began."""
    if begun == current:
        return
    keys = {
        "dataset_digest": "data.train (its content)",
        "dataset_length": "data.train (its number of rows)",
        "batch_size": "data.batch_size",
        "group_size": "actor.group_size",
        "seed": "run.seed",
    }
    changed = [
        f"{key} was {getattr(begun, name)} and is {getattr(current, name)}"
        for name, key in keys.items()
        if getattr(begun, name) != getattr(current, name)
    ]
    raise ConfigError(
        f"this run cannot be resumed: {'; '.join(changed)}. Expected the values it began with; "
        "set them back, choose another run.name, or set run.existing to replace"
    )


def newest_checkpoint(ledger: LedgerState, checkpoints: Checkpoints) -> CheckpointRecord | None:
    """The newest checkpoint that the ledger names and that exists."""
    return next((record for record in reversed(ledger.checkpoints) if checkpoints.exists(record)), None)
