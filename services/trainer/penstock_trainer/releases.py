"""From new weights to announced version: stage, record, push, announce; one version at a time, while training goes on.

Owns a version until it is announced: its identity, its canary, its files. Invariants: weights are recorded before they
are pushed; a version is announced after its push has ended and before the next push begins; the script that announces
it resolves its tickets and issues new ones.

    step k trained -> publish_beside: wait for the push before -> stage -> record -> push -> announce -> evaluate
                                                                      ^         ^
                                       `staged` returns here: step k + 1 may be committed; `drained` returns at the end

With `checkpoint.keep_best` a push waits until the evaluation of the version before it has ended (`evaluated`).

If trainer and engines take turns on the GPUs, the trainer leaves them after `record`, each push wakes the engines, also
with weights that they had before, and their turn begins after `announce`.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from penstock.broker.trainer import TrainerQueue
from penstock.contracts import PolicyIdentity
from penstock.contracts.canary import Canary
from penstock.contracts.ledger import LedgerState, StepRecord, WeightsRecord
from penstock.contracts.services import Announcement
from penstock_trainer.checkpoints.history import History
from penstock_trainer.control import first_of
from penstock_trainer.rollouts.evaluation import Evaluation
from penstock_trainer.rollouts.issuing import Issuer
from penstock_trainer.rollouts.versions import Versions
from penstock_trainer.telemetry.metrics import TrainerMetrics
from penstock_trainer.telemetry.records import PushTimes
from penstock_trainer.telemetry.status import Status
from penstock_trainer.weight_sync.canary import CanaryMaker
from penstock_trainer.weight_sync.publisher import Fences, Publisher, Push
from penstock_trainer.weight_sync.transport import Transport
from penstock_trainer.weight_sync.turns import Turns

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Release:
    """Weights to announce, which include the first `num_steps` steps; not pushed again if nothing changed."""

    announcement: Announcement
    num_steps: int
    changed: bool


@dataclass(frozen=True)
class Origin:
    """Device and number of ranks that computed the weights: a replay with the same gives the same bits.

    form: type and rounding of the bytes that are published, of which the digest is.
    """

    num_ranks: int
    device: str
    form: str


class Releases:
    """The versions of one trainer, in order.

    await releases.begin(num_steps=0, version=0)                   version 0 is announced: tickets are issued
    releases.publish_beside(group, step_0, version=1, changed=True)
    await releases.staged()                                        step 1 may be committed
    await releases.drained()                                       version 1 is announced
    """

    def __init__(
        self,
        queue: TrainerQueue,
        transport: Transport,
        canary: CanaryMaker,
        publisher: Publisher,
        issuer: Issuer,
        versions: Versions,
        history: History,
        evaluation: Evaluation,
        *,
        origin: Origin,
        changed: asyncio.Event,
        computing: Callable[[], AbstractContextManager[None]],
        metrics: TrainerMetrics,
        status: Status,
        turns: Turns | None = None,
        stop: asyncio.Event | None = None,
    ) -> None:
        """stop: of the run. If it is given, an evaluation is of one version: the next push waits until it has ended.

        `changed` is set when a version is announced; `computing` goes around the trainer's own work."""
        self._queue = queue
        self._transport = transport
        self._canary_maker = canary
        self._publisher = publisher
        self._issuer = issuer
        self._versions = versions
        self._history = history
        self._evaluation = evaluation
        self._origin = origin
        self._changed = changed
        self._computing = computing
        self._metrics = metrics
        self._status = status
        self._turns = turns
        self._stop = stop
        self._identity = PolicyIdentity(0, "")
        self._canary: Canary | None = None
        self._staging: asyncio.Task[None] | None = None
        self._pushing: asyncio.Task[None] | None = None
        self._seconds = {"stage": 0.0, "push": 0.0, "push_paused": 0.0} | ({} if turns is None else {"leave": 0.0})
        self._pushes: tuple[PushTimes, ...] = ()
        self._last_eval_steps = -1
        self.fences = Fences()

    async def reopen(self, ledger: LedgerState) -> None:
        """Restore the versions of earlier lives; remove their files, except those of the announced version."""
        self._versions.restore(ledger.policies)
        announced = await self._queue.queue.announced()
        await asyncio.to_thread(self._transport.prune, {announced.identity.number} if announced else set())
        if announced is not None:  # until the next one is: tickets that a drop issues carry it
            self._versions.announce(announced.identity)

    def digest(self, version: int) -> PolicyIdentity:
        """The identity of the current weights as `version`; keeps nothing. In a thread."""
        return self._transport.digest(version)

    async def begin(self, num_steps: int, version: int) -> None:
        """Stage and announce the current weights; record them if the ledger lacks them."""
        self._identity = await self._stage(version)
        if self._versions.known.get(version) != self._identity:
            self._versions.replace(self._identity)
            await self._record(num_steps, changed=True)
        elif self._history.is_unfinished(num_steps):
            await self._record(num_steps, changed=False)
        await self._history.begin_journal()
        await self._leave_gpus()
        await self.publish(self._release(num_steps, changed=True))

    def publish_beside(self, beside: asyncio.TaskGroup, step: StepRecord, version: int, *, changed: bool) -> None:
        """Publish the weights after a committed step, while the loop goes on. An error ends `beside`."""
        self._staging = beside.create_task(self._stage_and_push(beside, step, version, changed))

    async def staged(self) -> None:
        """Wait until the weights of the last step are staged and recorded."""
        if self._staging is not None:
            await self._staging

    async def drained(self) -> None:
        """Wait until the weights of the last step are announced."""
        await self.staged()
        if self._pushing is not None:
            await self._pushing

    async def _stage_and_push(self, beside: asyncio.TaskGroup, step: StepRecord, version: int, changed: bool) -> None:
        if self._pushing is not None:
            await self._pushing
        start = time.monotonic()
        if changed:
            self._identity = await self._stage(version)
            self._versions.add(self._identity)
        await self._record(step.step + 1, changed=changed, step=step)
        self._seconds["stage"] += time.monotonic() - start
        await self._leave_gpus()
        self._pushing = beside.create_task(self.publish(self._release(step.step + 1, changed=changed)))

    async def _stage(self, version: int) -> PolicyIdentity:
        """Fix the bytes of the current weights, in the form that the transport sends, and measure their canary."""
        with self._computing():
            identity = await asyncio.to_thread(self._transport.stage, version, self._queue.lease.number)
            self._canary = await asyncio.to_thread(self._canary_maker.make, version)
        self._status.policy = identity
        self._metrics.policy_version.set(version)
        return identity

    async def _leave_gpus(self) -> None:
        if self._turns is not None:
            start = time.monotonic()
            await self._turns.leave()
            self._seconds["leave"] += time.monotonic() - start

    async def _record(self, num_steps: int, *, changed: bool, step: StepRecord | None = None) -> None:
        origin = self._origin
        record = WeightsRecord(self._identity, num_steps, changed, origin.num_ranks, origin.device, origin.form)
        await self._history.record_weights(record, step)

    def _release(self, num_steps: int, *, changed: bool) -> Release:
        lease = self._queue.lease.number
        path = str(self._transport.folder_of(self._identity.number, lease))
        announcement = Announcement(self._identity, path, lease, self._canary, self._transport.chunks)
        return Release(announcement, num_steps, changed)

    async def publish(self, release: Release) -> None:
        """Push, then announce, resolve and issue in one script."""
        announcement = release.announcement
        if release.changed or self._turns is not None:
            await self.evaluated()
            started_at = time.time()
            push = await self._publisher.push(announcement)
            self.fences.pushed(announcement, push)
            self._note(push)
            times = PushTimes(announcement.identity.number, started_at, started_at + push.seconds, push.paused_seconds)
            self._pushes += (times,)
            counts = {"num_live": len(push.live), "fenced": push.fenced}  # not a thousand names a version
            log.info("version %s is pushed", announcement.identity, extra=counts)
        self._versions.announce(announcement.identity)
        await self._issuer.announce(announcement, release.num_steps)
        if self._turns is not None:
            await self._turns.end()
        if self._evaluation.due(release.num_steps):
            await self.evaluate(release.num_steps)
        self._changed.set()

    async def evaluated(self) -> None:
        """Wait until no evaluation of the announced weights is under way, if it must be of no others; not at a stop."""
        while self._stop is not None and self._evaluation.num_waiting and not self._stop.is_set():
            self._evaluation.arrived.clear()
            await first_of(self._evaluation.arrived, self._stop)
            with self._computing():  # an arrival is progress
                pass

    def _note(self, push: Push) -> None:
        self._metrics.pushed(
            num_live=len(push.live),
            num_fenced=len(push.fenced),
            seconds=push.seconds,
            paused_seconds=push.paused_seconds,
            left=[each.reason for each in push.left],
        )
        self._status.fenced = push.fenced
        self._seconds["push"] += push.seconds
        self._seconds["push_paused"] += push.paused_seconds

    def take_seconds(self, waited_seconds: float) -> dict[str, float]:
        """Seconds of the stagings and pushes that have ended since the last call.

        `waited_seconds`: those in which training waited. `push_exposed`: these, plus those in which generation was
        paused.
        """
        self._metrics.push_exposed.labels(part="training").inc(waited_seconds)
        taken, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        return {**taken, "push_exposed": waited_seconds + taken["push_paused"]}

    def take_pushes(self) -> tuple[PushTimes, ...]:
        """The pushes that have ended since the last call."""
        taken, self._pushes = self._pushes, ()
        return taken

    async def evaluate(self, num_steps: int) -> None:
        """Evaluate the announced weights on each set, once per step, also if an earlier life has done it."""
        if self._last_eval_steps == num_steps:
            return
        progress = self._status.progress
        if lacking := [name for name in self._evaluation.sets if not progress.has_eval(num_steps, name)]:
            self._last_eval_steps = num_steps
            tickets = self._evaluation.start(num_steps, self._versions.announced_version, lacking)
            await self._queue.issue_eval(tickets)

    def snapshot(self) -> Announcement:
        """The newest version as files, with its canary, for a server that is behind. In a thread."""
        return self._canary_maker.beside(self._transport.snapshot())

    def close(self) -> None:
        """Remove all files: a later trainer stages its weights again before it announces them."""
        self._transport.close()
