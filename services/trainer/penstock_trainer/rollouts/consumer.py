"""Takes scored groups and decides what each means for its ticket.

Owns the groups that have arrived and wait for their batch. Invariant: a group is held, and so stays in the queue, until
a step is committed that trains it, or its ticket is dropped or issued again; every other arrival (duplicate,
evaluation) is deleted.

    scored -> judge -> held ........ trained                 reward_failed, degenerate, poison -> dropped -> refill
                    -> issued again  (unknown version)
                    -> deleted       (duplicate, evaluation)

    What is held and stale when its batch closes: in order `ticket` issued again; in order `ready` dropped -> refill, or
    trained in part (`masking`).
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from penstock.broker import Delivery, Stage, Worker
from penstock.broker.trainer import TrainerQueue
from penstock.contracts import DropReason, MalformedMessageError, PolicyIdentity, ScoredGroup, decode
from penstock.contracts.ledger import DropRecord
from penstock.contracts.stored_groups import Part, ScoredHead, scored_group
from penstock.errors import StallError
from penstock.tickets import TicketBook
from penstock_trainer.batching.batch import MIN_VALID, num_valid
from penstock_trainer.batching.masking import is_all_masked
from penstock_trainer.data.draws import Draws
from penstock_trainer.rollouts.evaluation import Evaluation
from penstock_trainer.rollouts.generation_time import Generation
from penstock_trainer.telemetry.metrics import TrainerMetrics
from penstock_trainer.telemetry.records import EvalResult

log = logging.getLogger(__name__)

WAIT_SECONDS = 1.0  # also how soon work of a dead consumer is found
TAKEN_AT_ONCE = 8  # the server answers nobody else while it copies them
POISON = "poison"
REWARD_FAILED = "reward_failed"
DEGENERATE = "degenerate"
STALE = "stale"
EVAL_PREFIX = "e"


@dataclass(frozen=True)
class Arrival:
    """A group that waits for its batch, and the entry that it stays in until then."""

    delivery: Delivery
    group: ScoredGroup

    @property
    def number(self) -> int:
        return self.group.group.ticket.number


def oldest_version(group: ScoredGroup) -> int | None:
    """The lowest version that generated any token of the group."""
    versions = (completion.oldest_version for completion in group.group.completions)
    return min((version for version in versions if version is not None), default=None)


class Consumer:
    """The arrivals of one trainer."""

    def __init__(
        self,
        trainer_queue: TrainerQueue,
        worker: Worker,
        book: TicketBook,
        draws: Draws,
        evaluation: Evaluation,
        metrics: TrainerMetrics,
        *,
        has_gradient: Callable[[ScoredGroup], bool],
        dynamic_sampling: bool,
        max_staleness: int,
        order: Literal["ticket", "ready"] = "ticket",
        max_lag: int | None = None,
    ) -> None:
        """`has_gradient`: whether a group moves the policy under the run's objective.

        In order `ready`: `max_lag` is the largest lag of a token that is not masked; None: stale groups are dropped.
        """
        self._queue = trainer_queue
        self._worker = worker
        self._book = book
        self._draws = draws
        self._evaluation = evaluation
        self._metrics = metrics
        self._has_gradient = has_gradient
        self._dynamic_sampling = dynamic_sampling
        self._max_staleness = max_staleness
        self._order = order
        self.max_lag = max_lag
        self._held: dict[int, Arrival] = {}
        self.changed = asyncio.Event()
        self.tickets_known = asyncio.Event()
        """Set once the book holds what is outstanding: before, every arrival would look like a duplicate."""
        self.policies: dict[int, PolicyIdentity] = {}
        self.announced_version = 0
        self.last_failure = ""
        """Why a ticket was last dropped, in the words of the service that failed."""
        self.eval_results: list[EvalResult] = []
        self.generation = Generation()

    async def consume_groups(self) -> None:
        """Take and judge scored groups for ever, once it is known which tickets are outstanding."""
        await self.tickets_known.wait()
        while True:
            deliveries = await self._worker.take_several(Stage.SCORED, TAKEN_AT_ONCE)
            for delivery, parts in zip(deliveries, await self._worker.read(deliveries, *Part), strict=True):
                await self._judge(delivery, parts)
                self.changed.set()
            if not deliveries:
                await self._worker.wait(Stage.SCORED, timeout_seconds=WAIT_SECONDS)

    async def refill(self) -> None:
        """Issue the tickets that the credits allow."""
        numbers = self._book.issue()
        if numbers:
            version = self.announced_version
            await self._queue.issue([self._draws.ticket(n, attempt=0, policy_version=version) for n in numbers])
            self._metrics.queue.tickets.labels(state="issued", reason="").inc(len(numbers))

    async def next_batch(self, version: int) -> list[Arrival] | None:
        """The next batch, for weights of `version`; None while it is not complete.

        The check on the versions that the engine asserted: no token that is too old is trained, in any order.
        """
        while (numbers := self._book.next_batch()) is not None:
            batch = [self._held[number] for number in numbers]
            stale = [each for each in batch if self._is_stale(each.group, version)]
            if self.max_lag is not None:
                stale = self._mask(stale, version, self.max_lag)
            if not stale:
                return batch
            for arrival in stale:
                await self._refuse(arrival, version)
            self.changed.set()  # it may have been the last ticket: the caller looks again before it waits
        return None

    def _mask(self, stale: list[Arrival], version: int, max_lag: int) -> list[Arrival]:
        """Those that may not stay: nothing of them is left, and a batch is to hold groups with a gradient only."""
        moving = [each for each in stale if self._has_gradient(each.group)]
        empty = [each for each in moving if is_all_masked(each.group, version, max_lag)]
        if self._dynamic_sampling:
            return empty
        for arrival in empty:
            self._book.lose_gradient(arrival.number)
        return []

    async def _refuse(self, arrival: Arrival, version: int) -> None:
        """A stale group is not trained: its ticket is issued again, or ends."""
        del self._held[arrival.number]
        if self._order == "ticket":
            self._book.wait_again(arrival.number)
            await self._issue_again(arrival.delivery, arrival.group, f"stale at version {version}", STALE)
        else:
            log.info("ticket %d is dropped: stale at version %d", arrival.number, version)
            await self._drop(arrival.delivery, arrival.number, STALE)

    def release(self, batch: list[Arrival]) -> None:
        """The batch is committed: its entries are gone from the queue."""
        for arrival in batch:
            del self._held[arrival.number]
            self._worker.forget(arrival.delivery)

    def _is_stale(self, group: ScoredGroup, version: int) -> bool:
        oldest = oldest_version(group)
        return oldest is not None and version - oldest > self._max_staleness

    async def _judge(self, delivery: Delivery, parts: Mapping[Part, bytes | None]) -> None:
        if delivery.reason:
            await self._judge_dead(delivery)
            return
        try:
            head = decode(delivery.payload, ScoredHead)
            if head.group.ticket.key != delivery.ticket_key:
                raise MalformedMessageError(f"a group of ticket {head.group.ticket.key}, sent as {delivery.ticket_key}")
            scored = scored_group(head, parts)
        except MalformedMessageError as error:
            await self._bury(delivery, str(error))
            return
        if scored.group.ticket.purpose == "eval":
            self._add_result(self._evaluation.record(scored))
            await self._discard(delivery)
        else:
            await self._judge_training(delivery, scored)

    async def _judge_dead(self, delivery: Delivery) -> None:
        """A note that a ticket's message is in the dead letters; one that names none of ours concerns nobody."""
        self._metrics.queue.dead_letters.labels(reason="reported").inc()
        if not await self._lose(delivery.ticket_key, delivery.reason, delivery):
            await self._discard(delivery)

    async def _lose(self, key: str, reason: str, note: Delivery | None) -> bool:
        """The ticket's message cannot be used. True when a training ticket was dropped, and the note of it deleted."""
        if key.isdecimal() and self._book.accepts(int(key)):
            self.last_failure = reason
            await self._drop(note, int(key), POISON)
            return True
        if key.startswith(EVAL_PREFIX) and key[1:].isdecimal():
            log.error("evaluation ticket %s could not be answered: %s", key, reason)
            self._add_result(self._evaluation.give_up(int(key[1:])))
        return False

    def _add_result(self, result: EvalResult | None) -> None:
        if result is not None:
            self.eval_results.append(result)

    async def _judge_training(self, delivery: Delivery, scored: ScoredGroup) -> None:
        number = scored.group.ticket.number
        if not self._book.accepts(number):
            self._metrics.queue.duplicates.inc()
            await self._discard(delivery)
            return
        self.generation.add(scored.group)
        unknown = self._unknown_policy(scored)
        if unknown:
            await self._issue_again(delivery, scored, f"it was generated by unknown weights {unknown}", "version")
        elif num_valid(scored) < MIN_VALID:
            self.last_failure = next((score.failure for score in scored.scores if score.failure), "")
            log.warning("ticket %d has no reward: %s", number, self.last_failure)
            await self._drop(delivery, number, REWARD_FAILED)
        elif self._dynamic_sampling and not self._has_gradient(scored):
            await self._drop(delivery, number, DEGENERATE)
        else:
            self._held[number] = Arrival(delivery, scored)
            self._book.arrive(number, has_gradient=self._has_gradient(scored))

    async def _bury(self, delivery: Delivery, reason: str) -> None:
        """A message that does not decode: to the dead letters, and its ticket, if it names one of ours, is poison."""
        self._metrics.queue.dead_letters.labels(reason="malformed").inc()
        await self._worker.bury(delivery, reason)
        await self._lose(delivery.ticket_key, reason, None)

    async def _drop(self, delivery: Delivery | None, number: int, reason: str) -> None:
        await self._queue.drop(DropRecord(number, DropReason(reason)), delivery)
        if delivery is not None:
            self._worker.forget(delivery)
        self._metrics.queue.tickets.labels(state="dropped", reason=reason).inc()
        if reason == STALE:
            self._book.expire(number)
            await self.refill()
            return
        try:
            self._book.drop(number, reward_failed=reason == REWARD_FAILED, degenerate=reason == DEGENERATE)
        except StallError as error:
            last = f"; the last one: {self.last_failure}" if reason == REWARD_FAILED else ""
            raise StallError(f"{error}{last}") from None
        await self.refill()

    async def _discard(self, delivery: Delivery) -> None:
        await self._queue.discard(delivery)
        self._worker.forget(delivery)

    async def _issue_again(self, delivery: Delivery, scored: ScoredGroup, why: str, reason: str) -> None:
        """`why`: in words, for the log; `reason`: the label that counts it."""
        number = scored.group.ticket.number
        attempt = max(delivery.attempt, scored.group.ticket.attempt) + 1
        ticket = self._draws.ticket(number, attempt=attempt, policy_version=self.announced_version)
        log.warning("ticket %d is issued again: %s", number, why, extra={"attempt": attempt})
        await self._queue.reissue(ticket, delivery)
        self._worker.forget(delivery)
        self._metrics.queue.tickets.labels(state="reissued", reason=reason).inc()

    def _unknown_policy(self, scored: ScoredGroup) -> str:
        for completion in scored.group.completions:
            for span in completion.spans:
                if self.policies.get(span.policy.number) != span.policy:
                    return str(span.policy)
        return ""
