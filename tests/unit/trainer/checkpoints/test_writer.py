"""Checkpoints during training: one at a time, in the ledger only once it is complete, and no failure is silent."""

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
import torch

from penstock.broker.trainer import TrainerQueue
from penstock.contracts.ledger import CheckpointRecord, LedgerState
from penstock.errors import PenstockError
from penstock_trainer.checkpoints.folders import CheckpointMeta, Checkpoints
from penstock_trainer.checkpoints.step_files import StepFiles
from penstock_trainer.checkpoints.tensors import StateCopy, copy_state
from penstock_trainer.checkpoints.writer import CheckpointWriter
from penstock_trainer.learner.learner import Learner
from penstock_trainer.telemetry.metrics import TrainerMetrics


class GatedStateCopy(StateCopy):
    """A copy whose write waits until the test opens the gate."""

    gate: threading.Event

    def write(self, folder: Path) -> None:
        assert self.gate.wait(10)
        super().write(folder)


@dataclass
class FakeLearner:
    gate: threading.Event = field(default_factory=threading.Event)
    copies: int = 0

    def snapshot(self, folder: Path) -> StateCopy:
        self.copies += 1
        snapshot = GatedStateCopy(copy_state({"w": torch.zeros(3)}, None, None).state)
        object.__setattr__(snapshot, "gate", self.gate)
        return snapshot


@dataclass
class FakeQueue:
    """A ledger that checks the disk when a record arrives."""

    checkpoints: Checkpoints
    records: list[CheckpointRecord] = field(default_factory=list)

    async def append(self, record: CheckpointRecord) -> None:
        self.checkpoints.read(record.name)
        self.records.append(record)

    async def ledger(self) -> LedgerState:
        return LedgerState(checkpoints=list(self.records))


@dataclass
class WriterSetup:
    folder: Path
    learner: FakeLearner
    queue: FakeQueue
    writer: CheckpointWriter
    writing: "asyncio.Task[None]"

    async def save(self, steps: int) -> None:
        await self.writer.save(CheckpointMeta(steps, steps, 1, 0, ()))

    def complete(self) -> list[str]:
        return self.queue.checkpoints.names()


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[WriterSetup]:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    learner, queue = FakeLearner(), FakeQueue(checkpoints)
    step_files = StepFiles(tmp_path / "steps", keep_bytes=0)
    writer = CheckpointWriter(
        cast(TrainerQueue, queue), cast(Learner, learner), checkpoints, step_files, TrainerMetrics()
    )
    writing = asyncio.create_task(writer.write_checkpoints())
    yield WriterSetup(tmp_path, learner, queue, writer, writing)
    learner.gate.set()
    writing.cancel()


async def test_saving_returns_before_anything_is_written(setup: WriterSetup) -> None:
    await setup.save(1)
    assert (setup.complete(), setup.queue.records) == ([], [])
    setup.learner.gate.set()
    await setup.writer.drained()
    assert setup.queue.records == [CheckpointRecord(1, "00000001.1")]


async def test_one_is_in_flight_and_older_ones_go_when_the_next_counts(setup: WriterSetup) -> None:
    await setup.save(1)
    second = asyncio.create_task(setup.save(2))
    await asyncio.sleep(0.05)
    assert (setup.learner.copies, second.done()) == (1, False)
    setup.learner.gate.set()
    await second
    await setup.writer.drained()
    assert [record.steps for record in setup.queue.records] == [1, 2]
    assert setup.complete() == ["00000002.1"]


async def test_a_failure_ends_the_writer(setup: WriterSetup) -> None:
    await setup.save(1)
    for temporary in (setup.folder / "checkpoints").iterdir():
        temporary.rmdir()
        temporary.touch()  # a folder that cannot be written into any more
    setup.learner.gate.set()
    with pytest.raises(PenstockError, match=r"checkpoint .* cannot be written"):
        await setup.writing
    assert setup.queue.records == []
