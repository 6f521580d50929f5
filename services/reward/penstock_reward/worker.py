"""The loop from rollouts to scored groups.

Invariants: every group that is taken is handed over, buried or given back; a completion whose reward failed goes on
with its reason (the trainer masks it), so that no reward function can hold up the queue.

    ROLLOUTS --take--> decode --> score (pool) --hand over--> SCORED
                          '--malformed--> dead

    Backpressure: at most `max_groups` are held; the rest stays in the stream, and tickets bound the stream.

Called by `__main__`. Heartbeat and renewal of what is held: `penstock.broker.Worker.keep_alive`.
"""

import asyncio
import logging
from typing import Protocol

from penstock.broker import Delivery, Stage
from penstock.contracts import Contract, MalformedMessageError, RolloutGroup, ScoredGroup, decode
from penstock.errors import RewardError
from penstock_reward.metrics import RewardMetrics
from penstock_reward.scoring import Scoring

log = logging.getLogger(__name__)

WAIT_SECONDS = 1.0  # after this `stop` is looked at
DRAIN_SECONDS = 5.0  # at the end: what is not scored by then is given back


class Consumer(Protocol):
    """What the loop needs of `penstock.broker.Worker`."""

    async def take(self, stage: Stage, held_version: int | None = None) -> Delivery | None: ...

    async def wait(self, *stages: Stage, timeout_seconds: float) -> None: ...

    async def hand_over(self, delivery: Delivery, message: Contract, to: Stage) -> bool: ...

    async def give_back(
        self, delivery: Delivery, *, failed: bool = False, engine_died: bool = False, reason: str = ""
    ) -> None: ...

    async def bury(self, delivery: Delivery, reason: str) -> None: ...


async def score_groups(
    consumer: Consumer, scoring: Scoring, metrics: RewardMetrics, stop: asyncio.Event, max_groups: int
) -> None:
    """Score groups, several at once, until `stop` is set; then finish or give back what is held."""
    try:
        async with asyncio.timeout(None) as patience, asyncio.TaskGroup() as tasks:
            stopping = tasks.create_task(stop.wait())
            running: set[asyncio.Task[None]] = set()
            while not stop.is_set():
                running = {task for task in running if not task.done()}
                if len(running) >= max_groups:
                    await asyncio.wait({stopping, *running}, return_when=asyncio.FIRST_COMPLETED)
                elif (delivery := await consumer.take(Stage.ROLLOUTS)) is not None:
                    running.add(tasks.create_task(_score_one(consumer, scoring, metrics, delivery)))
                else:
                    await consumer.wait(Stage.ROLLOUTS, timeout_seconds=WAIT_SECONDS)
            patience.reschedule(asyncio.get_running_loop().time() + DRAIN_SECONDS)
    except TimeoutError:
        log.warning("stopped with groups not scored after %g s; they were given back", DRAIN_SECONDS)


async def _score_one(consumer: Consumer, scoring: Scoring, metrics: RewardMetrics, delivery: Delivery) -> None:
    try:
        group = decode(delivery.payload, RolloutGroup)
    except MalformedMessageError as error:
        await consumer.bury(delivery, str(error))
        metrics.group_ended("buried")
        return
    try:
        scored = await _scored(scoring, metrics, group)
    except RewardError as error:
        await consumer.bury(delivery, str(error))
        metrics.group_ended("buried")
        return
    except asyncio.CancelledError:
        await consumer.give_back(delivery)  # free for others at once, not only when this service counts as dead
        raise
    metrics.group_ended("scored" if await consumer.hand_over(delivery, scored, Stage.SCORED) else "late")


async def _scored(scoring: Scoring, metrics: RewardMetrics, group: RolloutGroup) -> ScoredGroup:
    ticket = group.ticket
    texts = [completion.text for completion in group.completions]
    verdicts = await scoring.score(ticket.prompt, texts, ticket.answer, ticket.reward, ticket.metadata)
    if ticket.purpose == "train":
        for verdict in verdicts:
            if verdict.score.value is not None:
                metrics.scored(verdict.score.value)
    failures = [verdict.score.failure for verdict in verdicts if verdict.score.failure]
    if failures:
        log.warning(
            "%d of %d scores failed, first: %s", len(failures), len(verdicts), failures[0], extra={"ticket": ticket.key}
        )
    return ScoredGroup(group, tuple(verdict.score for verdict in verdicts))
