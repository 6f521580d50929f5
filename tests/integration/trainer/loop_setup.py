"""A trainer's loop over real parts: queue, learner, files, checkpoints; no rollout server, answers by hand.

`HeldTransport` holds a staging until the test lets it go; `Watch` tells how far the loop is.
"""

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.broker.trainer import TrainerQueue, read_ledger
from penstock.config import Config
from penstock.contracts import PolicyIdentity, ScoredGroup
from penstock.contracts.ledger import CheckpointRecord, RunRecord, StepRecord, WeightsRecord
from penstock.errors import WeightsError
from penstock_trainer.checkpoints.folders import Checkpoints
from penstock_trainer.checkpoints.step_files import StepFiles
from penstock_trainer.checkpoints.writer import CheckpointWriter
from penstock_trainer.control import Requests
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.update import StepResult
from penstock_trainer.loop import Trainer
from penstock_trainer.parts import Parts
from penstock_trainer.releases import Release, Releases
from penstock_trainer.reports import Reports
from penstock_trainer.telemetry.progress import Progress
from penstock_trainer.telemetry.status import Status
from penstock_trainer.telemetry.tracking import Tracking
from penstock_trainer.watchdog import Watchdog
from penstock_trainer.weight_sync.canary import CanaryMaker
from penstock_trainer.weight_sync.disk import DiskTransport
from penstock_trainer.weight_sync.publisher import Publisher
from penstock_trainer.weight_sync.rollout_client import RolloutClient
from penstock_trainer.weights.files import Format
from penstock_trainer.weights.staging import Staging
from tests.integration.trainer.consumer_setup import BATCH_SIZE, PROMPTS, Bench

SECONDS = 20


class HeldTransport(DiskTransport):
    """Files; from `hold` to `let_go` a staging waits after its bytes are written."""

    def __init__(self, staging: Staging) -> None:
        super().__init__(staging)
        self._free = threading.Event()
        self._free.set()
        self.error = ""

    def hold(self) -> None:
        self._free.clear()

    def let_go(self, error: str = "") -> None:
        """`error`: what the staging then ends with."""
        self.error = error
        self._free.set()

    def stage(self, version: int, lease: int) -> PolicyIdentity:
        identity = super().stage(version, lease)
        assert self._free.wait(SECONDS)
        if self.error:
            raise WeightsError(self.error)
        return identity


class Watch:
    """Counts what happened, in any thread, for who waits for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._counts: Counter[str] = Counter()

    def saw(self, what: str) -> None:
        with self._changed:
            self._counts[what] += 1
            self._changed.notify_all()

    def __getitem__(self, what: str) -> int:
        return self._counts[what]

    async def until(self, what: str, count: int) -> None:
        """Until `what` has happened `count` times."""
        await asyncio.to_thread(self._wait, what, count)

    def _wait(self, what: str, count: int) -> None:
        with self._changed:
            seen = self._changed.wait_for(lambda: self._counts[what] >= count, SECONDS)
        assert seen, f"{what}: {self._counts[what]} of {count}"


class WatchedLearner(Learner):
    """Says of each update when it begins, asks, and ends in any way. `beside`: what it says of itself."""

    watch: Watch
    beside = True

    @property
    def stages_beside_update(self) -> bool:
        return self.beside

    def update(
        self,
        groups: Sequence[ScoredGroup],
        *,
        version: int,
        max_lag: int | None = None,
        before_change: Callable[[], None] | None = None,
    ) -> StepResult:
        def ask() -> None:
            self.watch.saw("asked")
            assert before_change is not None
            before_change()

        self.watch.saw("begun")
        try:
            return super().update(groups, version=version, max_lag=max_lag, before_change=ask)
        finally:
            self.watch.saw("ended")


class WatchedReleases(Releases):
    watch: Watch

    async def publish(self, release: Release) -> None:
        await super().publish(release)
        self.watch.saw("announced")


class WatchedFiles(StepFiles):
    watch: Watch

    def write(self, *arguments: Any, **keywords: Any) -> StepRecord:
        record = super().write(*arguments, **keywords)
        self.watch.saw("written")
        return record


class LoopBench:
    """One life of a trainer."""

    def __init__(self, trainer_queue: TrainerQueue, config: Config, folder: Path) -> None:
        self.queue = trainer_queue
        self.bench = bench = Bench(trainer_queue, config, begun=False)
        self.watch = Watch()
        self.learner = WatchedLearner(config)
        self.transport = HeldTransport(Staging(self.learner, folder / "weights", Format("float32", "nearest")))
        self.step_files = WatchedFiles(folder / "steps", keep_bytes=2**20)
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=2)
        self.progress = Progress(folder / "progress")
        self._client = RolloutClient(config)
        self.requests = Requests(stop=asyncio.Event())
        status = Status("loop", 1, BATCH_SIZE, len(PROMPTS), 20, self.progress)
        publisher = Publisher(trainer_queue.queue, self._client, self.transport, 5.0)
        consumer, book, metrics = bench.consumer, bench.book, bench.metrics
        self.releases = WatchedReleases(
            trainer_queue, publisher, bench.issuer, bench.versions, bench.evaluation, bench.changed, metrics, status
        )
        self.learner.watch = self.step_files.watch = self.releases.watch = self.watch
        self.writer = CheckpointWriter(trainer_queue, self.learner, self.checkpoints, self.step_files, metrics)
        self.parts = Parts(
            config=config,
            trainer_queue=trainer_queue,
            book=book,
            issuer=bench.issuer,
            versions=bench.versions,
            consumer=consumer,
            changed=bench.changed,
            evaluation=bench.evaluation,
            releases=self.releases,
            learner=self.learner,
            transport=self.transport,
            canary=CanaryMaker(self.learner.sequence_logprobs, PROMPTS[0].token_ids, config),
            step_files=self.step_files,
            checkpoints=self.checkpoints,
            checkpoint_writer=self.writer,
            reports=Reports(
                self.progress,
                metrics,
                status,
                bench.evaluation,
                bench.generation,
                Tracking([], self.progress, 1.0),
                None,
            ),
            status=status,
            watchdog=Watchdog(trainer_queue, book, status, SECONDS),
            metrics=metrics,
            run_record=RunRecord("d" * 16, len(PROMPTS), BATCH_SIZE, 2, 0),
            final_folder=folder / "final",
        )

    @contextlib.asynccontextmanager
    async def training(self) -> AsyncIterator["asyncio.Task[None]"]:
        """The loop and what runs beside it; whoever leaves, leaves no task behind."""
        tasks = [
            asyncio.create_task(coroutine)
            for coroutine in (
                Trainer(self.parts, self.requests).train(),
                self.bench.consumer.consume_groups(),
                self.releases.publish_versions(),
                self.writer.write_checkpoints(),
            )
        ]
        try:
            yield tasks[0]
        finally:
            self.transport.let_go(self.transport.error)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.close()

    async def announced(self, version: int) -> PolicyIdentity:
        """The version's identity, once it is announced; each step makes one."""
        await self.watch.until("announced", version + 1)
        return self.bench.versions.known[version]

    async def answer(self, step: int, policy: PolicyIdentity) -> None:
        """The groups of a step, generated by `policy`."""
        for number in range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE):
            await self.bench.answer(number, (1.0, 0.0), policy)

    async def ledger(self) -> list[str]:
        """Its records of steps and weights in order: weights 0, step 0, weights 1, ..."""
        names = {StepRecord: "step", WeightsRecord: "weights", CheckpointRecord: "checkpoint"}
        numbers = {StepRecord: "step", WeightsRecord: "steps", CheckpointRecord: "steps"}
        records = await read_ledger(self.queue.queue)
        return [f"{names[type(each)]} {getattr(each, numbers[type(each)])}" for each in records if type(each) in names]

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.learner.state().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
