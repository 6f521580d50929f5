"""A trainer's life with real parts: queue, learner, files, checkpoints. There is no rollout server: the test answers.

`HeldTransport` holds a staging until the test releases it; `Watch` counts the progress of the loop.
"""

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from penstock.broker import Stage
from penstock.broker.lease import Lease
from penstock.broker.queue import Queue
from penstock.broker.trainer import read_ledger
from penstock.config import Config
from penstock.contracts import PolicyIdentity, ScoredGroup
from penstock.contracts.ledger import CheckpointRecord, StepRecord, WeightsRecord
from penstock.contracts.services import Announcement
from penstock.contracts.vocabulary import MAIN_SET
from penstock.errors import WeightsError
from penstock.runtime.service import Service
from penstock_trainer.assemble import Assembly
from penstock_trainer.checkpoints.step_files import StepFiles
from penstock_trainer.data.run_prompts import Prompts
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.update import PendingUpdate, StepResult
from penstock_trainer.rollouts.issuing import Issuer
from penstock_trainer.weight_sync.disk import DiskTransport
from penstock_trainer.weights.files import Format
from penstock_trainer.weights.staging import Staging
from tests.integration.broker.queue_setup import put, stored_scored
from tests.integration.trainer.consumer_setup import BATCH_SIZE, PROMPTS, scored
from tests.patience import ANSWER_SECONDS
from tests.unit.trainer.data.chat_models import characters
from tests.unit.trainer.trainer_groups import save_tiny_model

SECONDS = ANSWER_SECONDS


def loop_document(queue_config: Config, folder: Path) -> dict[str, Any]:
    """The configuration of a trainer in `folder`, with a tiny model and prompts that the test gives."""
    given = queue_config.model_dump()
    given["actor"] = {"path": str(save_tiny_model(folder / "model")), "dtype": "float32", "group_size": 2}
    given["run"] |= {"root": str(folder), "stall_seconds": SECONDS}
    given["data"] |= {"batch_size": BATCH_SIZE, "eval": {"path": "unused.jsonl"}}
    given["rollout"]["engine"]["dtype"] = "float32"
    given["weights"]["push_timeout_seconds"] = SECONDS
    return given


class HeldTransport(DiskTransport):
    """The disk transport; between `hold` and `let_go`, a staging waits after it has written its bytes."""

    def __init__(self, staging: Staging) -> None:
        super().__init__(staging)
        self._free = threading.Event()
        self._free.set()
        self.error = ""

    def hold(self) -> None:
        self._free.clear()

    def let_go(self, error: str = "") -> None:
        """`error`: if given, the staging ends with this error."""
        self.error = error
        self._free.set()

    def stage(self, version: int, lease: int) -> PolicyIdentity:
        identity = super().stage(version, lease)
        assert self._free.wait(SECONDS)
        if self.error:
            raise WeightsError(self.error)
        return identity


class Watch:
    """Counts events, from any thread, and lets the test wait for them."""

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
        """Wait until `what` has happened `count` times."""
        await asyncio.to_thread(self._wait, what, count)

    def _wait(self, what: str, count: int) -> None:
        with self._changed:
            seen = self._changed.wait_for(lambda: self._counts[what] >= count, SECONDS)
        assert seen, f"{what}: {self._counts[what]} of {count}"


class WatchedLearner(Learner):
    """Counts gradients that begin, gradients that are computed, and updates that are finished.

    beside: whether weights may be read while a gradient is computed.
    """

    watch: Watch
    beside = True

    @property
    def reads_beside_gradient(self) -> bool:
        return self.beside

    def begin(self, groups: Sequence[ScoredGroup], *, version: int, max_lag: int | None = None) -> PendingUpdate:
        self.watch.saw("begun")
        pending = super().begin(groups, version=version, max_lag=max_lag)
        self.watch.saw("gradient")

        def finish() -> StepResult:
            result = pending.finish()
            self.watch.saw("finished")
            return result

        return PendingUpdate(finish)


class WatchedIssuer(Issuer):
    watch: Watch

    async def announce(self, announcement: Announcement, num_steps: int) -> None:
        await super().announce(announcement, num_steps)
        self.watch.saw("announced")


class WatchedFiles(StepFiles):
    watch: Watch

    def write(self, *arguments: Any, **keywords: Any) -> StepRecord:
        record = super().write(*arguments, **keywords)
        self.watch.saw("written")
        return record


class Life(Assembly):
    """One life of a trainer, assembled as in the product, except for the parts that hold and count."""

    learner: WatchedLearner
    step_files: WatchedFiles

    def __init__(self, config: Config, queue: Queue, lease: Lease) -> None:
        service = cast(Service, SimpleNamespace(stop=asyncio.Event(), url="http://127.0.0.1:1"))
        step_files = WatchedFiles(Path(config.run.root) / config.run.name / "steps", keep_bytes=2**20)
        prompts = Prompts(PROMPTS, {MAIN_SET: PROMPTS[:1]}, (2,), PROMPTS[0].token_ids, characters())
        learner = self.make_learner(config)
        super().__init__(config, service, queue, lease, learner, prompts, step_files)
        self.watch = Watch()
        self.learner.watch = self.step_files.watch = self.watch

    def make_learner(self, config: Config) -> WatchedLearner:
        return WatchedLearner(config)

    @cached_property
    def transport(self) -> HeldTransport:
        return HeldTransport(Staging(self.learner, self.folder / "weights", Format("float32", "nearest")))

    @cached_property
    def issuer(self) -> Issuer:
        issuer = WatchedIssuer(self.trainer_queue, self.draws, self.book, self.versions, self.metrics.queue)
        issuer.watch = self.watch
        return issuer

    @contextlib.asynccontextmanager
    async def training(self) -> AsyncIterator["asyncio.Task[None]"]:
        """Run the loop and its background tasks; at the end no task is left."""
        tasks = [asyncio.create_task(coroutine) for coroutine in (self.train(), *self.background())]
        try:
            yield tasks[0]
        finally:
            self.transport.let_go(self.transport.error)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.client.close()
            await self.worker.retire()

    async def announced(self, version: int) -> PolicyIdentity:
        """Wait until the version is announced; returns its identity. Each step makes one version."""
        await self.watch.until("announced", version + 1)
        return self.versions.known[version]

    async def answer(self, step: int, policy: PolicyIdentity, values: Sequence[float] = (1.0, 0.0)) -> None:
        """The groups of a step, generated by `policy`. values: the rewards of each."""
        batch_size = self.config.data.batch_size
        for number in range(step * batch_size, (step + 1) * batch_size):
            await self.answer_ticket(number, policy, values)

    async def answer_ticket(self, number: int, policy: PolicyIdentity, values: Sequence[float] = (1.0, 0.0)) -> None:
        """The group of a ticket."""
        ticket = self.draws.ticket(number, attempt=0, policy_version=policy.number)
        await put(self.queue, Stage.SCORED, str(number), stored_scored(scored(ticket, values, policy)))

    async def depth(self, stream: str) -> int:
        return (await self.queue.depths())[stream]

    async def read_ledger(self) -> list[str]:
        """The ledger's records of steps and weights in order: weights 0, step 0, weights 1, ..."""
        names = {StepRecord: "step", WeightsRecord: "weights", CheckpointRecord: "checkpoint"}
        numbers = {StepRecord: "step", WeightsRecord: "steps", CheckpointRecord: "steps"}
        records = await read_ledger(self.queue)
        return [f"{names[type(each)]} {getattr(each, numbers[type(each)])}" for each in records if type(each) in names]

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.learner.state().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
