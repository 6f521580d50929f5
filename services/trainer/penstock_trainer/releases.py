"""From new weights to announced version: push, announce, resolve, issue; one version at a time, beside training.

Owns the announced version. Invariant: a version is announced after its push has ended and before the next one
begins; the same script that announces it resolves its tickets and issues new ones, while the trainer computes its next
step.

    step k trained -> submit (waits while an earlier push runs) -> push -> announce v, resolve, issue -> evaluation
"""

import asyncio
import logging
from dataclasses import dataclass

from penstock.broker.trainer import TrainerQueue
from penstock.contracts.services import Announcement
from penstock_trainer.rollouts.evaluation import Evaluation
from penstock_trainer.rollouts.issuing import Issuer
from penstock_trainer.rollouts.versions import Versions
from penstock_trainer.telemetry.metrics import TrainerMetrics
from penstock_trainer.telemetry.status import Status
from penstock_trainer.weight_sync.publisher import Fences, Publisher, Push

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Release:
    """Weights to announce, which include the first `num_steps` steps; not pushed again where nothing changed."""

    announcement: Announcement
    num_steps: int
    changed: bool


class Releases:
    """The versions of one trainer, in order."""

    def __init__(
        self,
        trainer_queue: TrainerQueue,
        publisher: Publisher,
        issuer: Issuer,
        versions: Versions,
        evaluation: Evaluation,
        changed: asyncio.Event,
        metrics: TrainerMetrics,
        status: Status,
    ) -> None:
        self._queue = trainer_queue
        self._publisher = publisher
        self._issuer = issuer
        self._versions = versions
        self._evaluation = evaluation
        self._changed = changed
        self._metrics = metrics
        self._status = status
        self._seconds = {"push": 0.0, "push_paused": 0.0}
        self._pending: Release | None = None
        self._submitted = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.last_eval_steps = -1
        self.fences = Fences()

    async def publish_versions(self) -> None:
        """Publish what is submitted, for ever."""
        while True:
            await self._submitted.wait()
            self._submitted.clear()
            assert self._pending is not None
            await self.publish(self._pending)
            self._idle.set()
            self._changed.set()

    async def submit(self, release: Release) -> None:
        """Hand a version over; returns at once unless an earlier one is still being pushed."""
        await self.drained()
        self._idle.clear()
        self._pending = release
        self._submitted.set()

    async def drained(self) -> None:
        """Wait until nothing is being pushed."""
        await self._idle.wait()

    async def publish(self, release: Release) -> None:
        """Push, then announce, resolve and issue in one script."""
        announcement = release.announcement
        if release.changed:
            push = await self._publisher.push(announcement)
            self.fences.pushed(announcement, push)
            self._note(push)
            log.info("version %s is pushed", announcement.identity, extra={"live": push.live, "fenced": push.fenced})
        self._versions.announce(announcement.identity)
        await self._issuer.announce(announcement, release.num_steps)
        if self._evaluation.due(release.num_steps):
            await self.evaluate(release.num_steps, announcement.identity.number)

    def _note(self, push: Push) -> None:
        metrics = self._metrics
        metrics.publish_duration.observe(push.seconds)
        metrics.pushes.labels(outcome="live").inc(len(push.live))
        metrics.pushes.labels(outcome="fenced").inc(len(push.fenced))
        metrics.push_exposed.labels(part="generation").inc(push.paused_seconds)
        self._status.fenced = push.fenced
        self._seconds["push"] += push.seconds
        self._seconds["push_paused"] += push.paused_seconds

    def take_seconds(self, waited_seconds: float) -> dict[str, float]:
        """Seconds of the pushes that have ended since the last call, which ran beside training. `push_exposed`: those
        that training waited for (given), plus those in which generation was paused."""
        self._metrics.push_exposed.labels(part="training").inc(waited_seconds)
        taken, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        return {**taken, "push_exposed": waited_seconds + taken["push_paused"]}

    async def evaluate(self, num_steps: int, version: int) -> None:
        """Ask for an evaluation of what is announced, once per step."""
        if self._evaluation.enabled and self.last_eval_steps != num_steps:
            self.last_eval_steps = num_steps
            await self._queue.issue_eval(self._evaluation.start(num_steps, version))
