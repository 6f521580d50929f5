"""The loop from rollouts to scored groups.

Invariants: every group that is taken is handed over, buried or given back; a completion whose reward failed keeps the
reason as its score (the trainer masks it); an outage of a function delays only the groups that need it. With a teacher
that servers have, a training completion with a score has the teacher's log-probabilities, or fails with the reason.

    ROLLOUTS --take--> read its texts --> score (pool) --hand over, take the next--> SCORED
                          |                   '--> ask the teacher (`teacher`) --hand over--^
                          '--malformed--> dead

    Backpressure: `Permits` bounds the groups that are held, in scoring and parked; the rest stays in the stream, and
    tickets bound the stream. The next group takes over the permit of the one before it. A group is parked while a
    breaker is open (`attempts`): it is held and renewed like any other. A group that is at the teacher has released its
    permit, so that others are scored meanwhile; tickets bound these, and each server of the teacher has a bound.

Heartbeat and renewal of the held groups: `penstock.broker.Worker.keep_alive`.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

import msgspec

from penstock.broker import Delivery, Stage
from penstock.contracts import MalformedMessageError, Score, decode
from penstock.contracts.stored_groups import Part, RolloutHeader, ScoredHeader, Taught, group_of, texts_of
from penstock.errors import RewardError
from penstock_reward.metrics import RewardMetrics
from penstock_reward.scoring.permits import Permit, Permits
from penstock_reward.scoring.scoring import Scoring
from penstock_reward.teacher.teacher import Teacher

log = logging.getLogger(__name__)

WAIT_SECONDS = 1.0  # the longest wait before a check of `stop`
DRAIN_SECONDS = 5.0  # at the end: groups that are not scored by then are given back


class GroupQueue(Protocol):
    """The part of `penstock.broker.Worker` that the loop needs."""

    async def take(self, *stages: Stage, has_room: bool = False) -> Delivery | None: ...

    @property
    def expects_wakeup(self) -> bool: ...

    async def wait(self, *, timeout_seconds: float) -> None: ...

    async def read(self, deliveries: Sequence[Delivery], *parts: Part) -> list[dict[Part, bytes | None]]: ...

    async def hand_over_and_take(
        self, delivery: Delivery, message: ScoredHeader | Taught, to: Stage, *stages: Stage
    ) -> tuple[bool, Delivery | None]: ...

    async def give_back(
        self, delivery: Delivery, *, failed: bool = False, engine_died: bool = False, reason: str = ""
    ) -> None: ...

    async def bury(self, delivery: Delivery, reason: str) -> bool: ...


async def score_groups(
    queue: GroupQueue,
    scoring: Scoring,
    metrics: RewardMetrics,
    stop: asyncio.Event,
    permits: Permits,
    teacher: Teacher | None = None,
) -> None:
    """Score groups, several at once, until `stop` is set; then finish the held groups or give them back."""
    try:
        async with asyncio.timeout(None) as patience, asyncio.TaskGroup() as tasks:
            stopping = tasks.create_task(stop.wait())
            while not stop.is_set():
                if not permits.has_room:
                    room = tasks.create_task(permits.room())
                    await asyncio.wait({stopping, room}, return_when=asyncio.FIRST_COMPLETED)
                    room.cancel()
                    continue
                permit = await permits.acquire()
                delivery = await queue.take(Stage.ROLLOUTS, has_room=permits.has_room)
                if delivery is not None:
                    tasks.create_task(_score_in_turn(queue, scoring, metrics, delivery, permit, stop, teacher))
                else:
                    permit.release()
                if delivery is None or queue.expects_wakeup:
                    await queue.wait(timeout_seconds=WAIT_SECONDS)
            patience.reschedule(asyncio.get_running_loop().time() + DRAIN_SECONDS)
    except TimeoutError:
        log.warning("stopped with groups not scored after %g s; they were given back", DRAIN_SECONDS)


async def _score_in_turn(
    queue: GroupQueue,
    scoring: Scoring,
    metrics: RewardMetrics,
    first: Delivery,
    permit: Permit,
    stop: asyncio.Event,
    teacher: Teacher | None,
) -> None:
    """Score a group, and then each group that a hand-over takes."""
    delivery: Delivery | None = first
    try:
        while delivery is not None:
            scored = await _score_one(queue, scoring, metrics, delivery, permit, teacher)
            if scored is None:
                return
            # If the loop waits, no group is free, and the next one wakes it.
            goes_on = not (stop.is_set() or permit.is_wanted or queue.expects_wakeup)
            stages = (Stage.ROLLOUTS,) if goes_on else ()
            moved, delivery = await queue.hand_over_and_take(delivery, scored, Stage.SCORED, *stages)
            metrics.group_ended("scored" if moved else "late")
    finally:
        permit.release()


async def _score_one(
    queue: GroupQueue,
    scoring: Scoring,
    metrics: RewardMetrics,
    delivery: Delivery,
    permit: Permit,
    teacher: Teacher | None,
) -> ScoredHeader | Taught | None:
    """The group with its scores, and what its teacher says; None if it was buried."""
    try:
        group = decode(delivery.payload, RolloutHeader)
        [parts] = await queue.read([delivery], Part.TEXTS)
        scored = await _scored(scoring, metrics, group, texts_of(group, parts[Part.TEXTS]), permit)
        if teacher is None or group.ticket.purpose != "train":
            return scored
        permit.release()
        return await _taught(queue, metrics, delivery, scored, teacher)
    except (MalformedMessageError, RewardError) as error:
        metrics.group_ended("buried" if await queue.bury(delivery, str(error)) else "late")
        return None
    except asyncio.CancelledError:
        await queue.give_back(delivery)  # so that others can take it at once, before this service counts as dead
        raise


async def _taught(
    queue: GroupQueue, metrics: RewardMetrics, delivery: Delivery, scored: ScoredHeader, teacher: Teacher
) -> Taught:
    """The group with the log-probabilities of what has a score; a trajectory without them fails."""
    [parts] = await queue.read([delivery], Part.COMPLETIONS)
    group = group_of(scored.group, parts)
    taught = await teacher.taught(group, [score.value is not None for score in scored.scores])
    scores = list(scored.scores)
    for index, reason in taught.failed.items():
        metrics.failed_without_call("teacher")
        scores[index] = Score(None, f"teacher: {reason}", scores[index].values)
    if taught.failed:
        _log_failures(scores, scored.group.ticket.key)
    return Taught(msgspec.structs.replace(scored, scores=tuple(scores)), taught.logprobs)


async def _scored(
    scoring: Scoring, metrics: RewardMetrics, group: RolloutHeader, texts: Sequence[str], permit: Permit
) -> ScoredHeader:
    ticket = group.ticket
    attempts = scoring.attempts(
        ticket.prompt, texts, ticket.answer, ticket.reward, ticket.metadata, group.environment_scores
    )
    while (verdicts := await attempts.run()) is None:
        log.info("parked until the breaker of %s closes", attempts.blocked_by, extra={"ticket": ticket.key})
        await permit.release_while(attempts.breakers_closed())
    if ticket.purpose == "train":
        for verdict in verdicts:
            if verdict.score.value is not None:
                metrics.scored(verdict.score.value)
    scores = tuple(verdict.score for verdict in verdicts)
    _log_failures(scores, ticket.key)
    return ScoredHeader(group, scores, attempts.functions)


def _log_failures(scores: Sequence[Score], ticket: str) -> None:
    if failures := [score.failure for score in scores if score.failure]:
        log.warning(
            "%d of %d scores failed, first: %s", len(failures), len(scores), failures[0], extra={"ticket": ticket}
        )
