"""Writes checkpoints while training goes on: the loop waits for the copy only.

Owns the one checkpoint that is in flight. Invariant: a checkpoint enters the ledger after all its bytes are flushed
and renamed; older ones are deleted after that; the next one waits until then. When writing fails, the process ends.

    step k trained -> save: copy the state -> training goes on
                              '-> write, flush, rename -> ledger -> prune
"""

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from penstock.broker.trainer import TrainerQueue
from penstock.errors import PenstockError
from penstock_trainer.checkpoints.best import KeepBest
from penstock_trainer.checkpoints.folders import CheckpointMeta, Checkpoints
from penstock_trainer.checkpoints.step_files import StepFiles
from penstock_trainer.checkpoints.tensors import StateCopy
from penstock_trainer.telemetry.metrics import TrainerMetrics

log = logging.getLogger(__name__)


class HasState(Protocol):
    """The object to save: the learner."""

    def snapshot(self, folder: Path) -> StateCopy: ...


@dataclass(frozen=True)
class _Pending:
    meta: CheckpointMeta
    folder: Path
    snapshot: StateCopy


class CheckpointWriter:
    """Saves the learner's state."""

    def __init__(
        self,
        trainer_queue: TrainerQueue,
        learner: HasState,
        checkpoints: Checkpoints,
        step_files: StepFiles,
        metrics: TrainerMetrics,
        best: KeepBest | None = None,
    ) -> None:
        """best: names checkpoints that stay beside the newest ones."""
        self._queue = trainer_queue
        self._learner = learner
        self._checkpoints = checkpoints
        self._step_files = step_files
        self._metrics = metrics
        self._best = best
        self._pending: _Pending | None = None
        self._submitted = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    async def save(self, meta: CheckpointMeta) -> None:
        """Copy the current state; it is written afterwards. Waits while an earlier one is still being written."""
        await self.drained()
        start = time.monotonic()
        folder = await asyncio.to_thread(self._checkpoints.begin, meta)
        snapshot = await asyncio.to_thread(self._learner.snapshot, folder)
        seconds = time.monotonic() - start
        self._metrics.checkpoint_exposed.observe(seconds)
        log.info("checkpoint %d is copied in %.2f s", meta.steps, seconds)
        self._idle.clear()
        self._pending = _Pending(meta, folder, snapshot)
        self._submitted.set()

    async def drained(self) -> None:
        """Wait until nothing is being written."""
        await self._idle.wait()

    async def write_checkpoints(self) -> None:
        """Write saved states, for ever."""
        while True:
            await self._submitted.wait()
            self._submitted.clear()
            assert self._pending is not None
            pending, self._pending = self._pending, None
            await self._write(pending)
            del pending  # the copy is as large as the state
            self._idle.set()

    async def _write(self, pending: _Pending) -> None:
        start = time.monotonic()
        try:
            await asyncio.to_thread(pending.snapshot.write, pending.folder)
            record = await asyncio.to_thread(self._checkpoints.complete, pending.folder, pending.meta)
        except PenstockError:
            await asyncio.to_thread(self._checkpoints.abandon, pending.folder)
            raise
        await self._queue.append(record)
        await asyncio.to_thread(self._step_files.journal.append, record)
        committed = (await self._queue.ledger()).checkpoints
        also = self._best.names(committed) if self._best is not None else set()
        oldest_needed = await asyncio.to_thread(self._checkpoints.prune, committed, also)
        await asyncio.to_thread(self._step_files.prune, oldest_needed)
        seconds = time.monotonic() - start
        self._metrics.checkpoint_written(seconds)
        log.info("checkpoint %s is written in %.2f s", record.name, seconds)
