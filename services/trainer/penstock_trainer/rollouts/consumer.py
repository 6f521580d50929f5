"""Takes scored groups and carries out the verdict on each.

Owns the groups that have arrived and wait for their batch. Invariant: a group is held, and so stays in the queue, until
a step is committed that trains it, or its ticket is dropped or issued again; every other arrival (duplicate,
evaluation) is deleted.

    scored -> take, decode -> judge -> Hold ...... trained     Drop    -> the ledger -> refill
                                    -> Reissue                 Discard -> deleted; evaluation counts its own

    A held group is judged again when its batch closes, and may then be issued again or dropped.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from penstock.broker import Delivery, Stage, Worker
from penstock.broker.trainer import TrainerQueue
from penstock.contracts import DropReason, MalformedMessageError, ScoredGroup, decode, read_ticket_key
from penstock.contracts.ledger import DropRecord, LedgerState
from penstock.contracts.stored_groups import Part, ScoredHeader, scored_group
from penstock.errors import StallError
from penstock.tickets import TicketBook
from penstock_trainer.batching.rewards import failed_share, failures_of, first_failure, lowest_right, most_frequent
from penstock_trainer.rollouts.evaluation import Evaluation
from penstock_trainer.rollouts.generation_time import GenerationTime
from penstock_trainer.rollouts.issuing import Issuer
from penstock_trainer.rollouts.judge import (
    Discard,
    DiscardReason,
    Drop,
    Hold,
    Reissue,
    Rules,
    judge,
    judge_closing,
    judge_unreadable,
)
from penstock_trainer.rollouts.reconcile import restore_tickets
from penstock_trainer.rollouts.versions import Versions
from penstock_trainer.telemetry.queue_metrics import QueueMetrics

log = logging.getLogger(__name__)

WAIT_SECONDS = 1.0  # also the time until work of a dead consumer is found
TAKEN_AT_ONCE = 8  # the server blocks all other clients while it copies them


@dataclass(frozen=True)
class Arrival:
    """A group that waits for its batch, and its entry in the queue until then.

    has_gradient: whether it moves the policy, as judged when it arrived.
    """

    delivery: Delivery
    group: ScoredGroup
    has_gradient: bool

    @property
    def number(self) -> int:
        return self.group.group.ticket.number


class Consumer:
    """The arrivals of one trainer."""

    def __init__(
        self,
        trainer_queue: TrainerQueue,
        worker: Worker,
        book: TicketBook,
        issuer: Issuer,
        versions: Versions,
        evaluation: Evaluation,
        generation: GenerationTime,
        changed: asyncio.Event,
        rules: Rules,
        metrics: QueueMetrics,
        *,
        drop: Callable[[DropRecord, Delivery | None], Awaitable[None]],
        dropped: Callable[[DropReason, ScoredGroup | None], None],
        buried: Callable[[], Awaitable[None]],
        with_outcome: Callable[[DropRecord, ScoredGroup | None], DropRecord] = lambda record, group: record,
    ) -> None:
        """`changed`: set when a batch or an evaluation may be complete, or the run at its end.

        drop: ends a ticket durably, and deletes its group if there is one. dropped: reports that, with the group.
        buried: reports new dead letters. with_outcome: adds to the record of a drop what draws need of it.
        """
        self._queue = trainer_queue
        self._worker = worker
        self._book = book
        self._issuer = issuer
        self._versions = versions
        self._evaluation = evaluation
        self._generation = generation
        self._changed = changed
        self._rules = rules
        self._metrics = metrics
        self._record_drop = drop
        self._report_drop = dropped
        self._report_buried = buried
        self._with_outcome = with_outcome
        self._held: dict[int, Arrival] = {}
        self._begun = asyncio.Event()
        self._last_failure = ""

    @property
    def last_failure(self) -> str:
        """The reason of the last failed trajectory or dropped ticket, in the words of the service that failed."""
        return self._last_failure

    @property
    def changed(self) -> asyncio.Event:
        """Set when a batch or an evaluation may be complete, or the run at its end. The loop clears it, then checks."""
        return self._changed

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return self._book.finished

    @property
    def is_evaluating(self) -> bool:
        """Whether results of an evaluation are still to come."""
        return self._evaluation.num_waiting > 0

    async def restore(self, ledger: LedgerState, *, steps: int, version: int) -> None:
        """Bring the tickets to the end of the ledger, after `steps` steps with weights of `version`; then begin."""
        max_staleness = self._rules.max_staleness
        await restore_tickets(
            self._queue, self._book, self._issuer, ledger, steps=steps, version=version, max_staleness=max_staleness
        )
        self.begin()

    def begin(self) -> None:
        """Start to judge: the book holds the outstanding tickets. Without it every arrival would be a duplicate."""
        self._begun.set()

    async def begun(self) -> None:
        """Wait until `begin`."""
        await self._begun.wait()

    async def consume_groups(self) -> None:
        """Take and judge scored groups for ever, after `begin`."""
        await self.begun()
        await self._report_buried()  # while there was no trainer
        while True:
            deliveries = await self._worker.take_several(Stage.SCORED, TAKEN_AT_ONCE)
            for delivery, parts in zip(deliveries, await self._worker.read(deliveries, *Part), strict=True):
                await self.receive(delivery, parts)
                self._changed.set()
            if not deliveries or self._worker.expects_wakeup:
                await self._worker.wait(timeout_seconds=WAIT_SECONDS)

    async def receive(self, delivery: Delivery, parts: Mapping[Part, bytes | None]) -> None:
        """Decode and judge one entry: a group, or the note that another service has buried a message."""
        if delivery.reason:
            self._metrics.dead_letters.labels(reason="reported").inc()
            await self._report_buried()
            await self._lose(delivery.ticket_key, delivery.reason, delivery)
            return
        try:
            scored = _decoded(delivery, parts)
        except MalformedMessageError as error:
            self._metrics.dead_letters.labels(reason="malformed").inc()
            await self._worker.bury(delivery, str(error))
            await self._report_buried()
            await self._lose(delivery.ticket_key, str(error), None)
            return
        verdict = judge(scored, self._rules, is_waiting=self._book.accepts, known=self._versions.known)
        if isinstance(verdict, Discard):
            await self._discard_group(verdict, delivery, scored)
        else:
            self._generation.add(scored.group)
            await self._settle(verdict, delivery, scored)

    async def next_batch(self, version: int) -> list[Arrival] | None:
        """The next batch, for weights of `version`; None while it is incomplete."""
        while (numbers := self._book.next_batch()) is not None:
            batch = [self._held[number] for number in numbers]
            refused: list[tuple[Arrival, Reissue | Drop]] = []
            for arrival in batch:
                verdict = judge_closing(arrival.group, self._rules, version=version, has_gradient=arrival.has_gradient)
                if not isinstance(verdict, Hold):
                    refused.append((arrival, verdict))
                elif not verdict.has_gradient and self._moves(arrival.group, has_gradient=arrival.has_gradient):
                    self._book.lose_gradient(arrival.number)
            if not refused:
                return batch
            for arrival, refusal in refused:
                await self._refuse(arrival, refusal)
            self._changed.set()  # it may have been the last ticket: the loop checks again before it waits
        return None

    def release(self, batch: Sequence[Arrival]) -> None:
        """Forget a committed batch: its entries are gone from the queue."""
        for arrival in batch:
            del self._held[arrival.number]
            self._worker.forget(arrival.delivery)

    async def _lose(self, ticket_key: str, why: str, note: Delivery | None) -> None:
        """End a ticket whose message is in the dead letters. note: the entry that reports it, if there is one."""
        verdict, named = judge_unreadable(ticket_key, why, is_waiting=self._book.accepts), read_ticket_key(ticket_key)
        if isinstance(verdict, Drop):
            await self._drop(int(ticket_key), verdict, note)
            return
        if named is not None and verdict == Discard(DiscardReason.EVALUATION):
            log.error("evaluation ticket %s could not be answered: %s", ticket_key, why)
            self._evaluation.give_up(named[1])
        if note is not None:
            await self._discard(note)

    async def _discard_group(self, verdict: Discard, delivery: Delivery, scored: ScoredGroup) -> None:
        if verdict.reason == DiscardReason.EVALUATION:
            self._evaluation.record(scored)
        else:
            self._metrics.duplicates.inc()
        await self._discard(delivery)

    async def _settle(self, verdict: Hold | Reissue | Drop, delivery: Delivery, scored: ScoredGroup) -> None:
        """Carry out the verdict on a ticket that was waited for."""
        number = scored.group.ticket.number
        match verdict:
            case Hold(has_gradient):
                self._held[number] = Arrival(delivery, scored, has_gradient)
                self._last_failure = first_failure(scored) or self._last_failure
                moves, failed = self._moves(scored, has_gradient=has_gradient), failed_share(scored)
                right = lowest_right(scored, self._rules.success)
                with self._naming_the_last_failure(failed > 0):
                    self._book.arrive(number, has_gradient=moves, failed_share=failed, right=right)
            case Reissue():
                await self._issue_again(verdict, delivery, scored)
            case Drop():
                await self._drop(number, verdict, delivery, scored, failed_share(scored))

    def _moves(self, scored: ScoredGroup, *, has_gradient: bool) -> bool:
        """Whether the group counts as one with a gradient for the book: its rewards move the policy, no other term."""
        return has_gradient and self._rules.has_advantage(scored)

    async def _refuse(self, arrival: Arrival, verdict: Reissue | Drop) -> None:
        """Do not train a held group: issue its ticket again, or end it."""
        del self._held[arrival.number]
        if isinstance(verdict, Reissue):
            self._book.wait_again(arrival.number)
            await self._issue_again(verdict, arrival.delivery, arrival.group)
        else:
            await self._drop(arrival.number, verdict, arrival.delivery, arrival.group)

    async def _issue_again(self, verdict: Reissue, delivery: Delivery, scored: ScoredGroup) -> None:
        await self._issuer.issue_again(scored.group.ticket, delivery, verdict)
        self._worker.forget(delivery)

    async def _drop(
        self,
        number: int,
        verdict: Drop,
        delivery: Delivery | None,
        group: ScoredGroup | None = None,
        failed_share: float = 0.0,
    ) -> None:
        """End a ticket, of which a share has failed. delivery, group: what goes with it, if there is one."""
        reason = verdict.reason
        if reason == DropReason.STALE:
            log.info("ticket %d is dropped: %s", number, verdict.why)
        elif reason == DropReason.REWARD_FAILED:
            log.warning("ticket %d has no reward: %s", number, verdict.why)
        if reason in (DropReason.REWARD_FAILED, DropReason.POISON):
            self._last_failure = verdict.why
        record = self._with_outcome(drop_record(number, verdict, group), group)
        await self._record_drop(record, delivery)
        if delivery is not None:
            self._worker.forget(delivery)
        self._metrics.tickets.labels(state="dropped", reason=reason).inc()
        self._report_drop(reason, group)
        right = None if group is None else lowest_right(group, self._rules.success)
        with self._naming_the_last_failure(reason == DropReason.REWARD_FAILED or failed_share > 0):
            self._book.drop(number, reason, failed_share, right)
        await self._issuer.refill()

    @contextmanager
    def _naming_the_last_failure(self, is_failure: bool) -> Iterator[None]:
        """A stall that a failure causes names it."""
        try:
            yield
        except StallError as error:
            raise StallError(f"{error}; the last one: {self._last_failure}" if is_failure else str(error)) from None

    async def _discard(self, delivery: Delivery) -> None:
        await self._queue.discard(delivery)
        self._worker.forget(delivery)


def drop_record(number: int, verdict: Drop, group: ScoredGroup | None) -> DropRecord:
    """The ledger's record of a ticket that ends without a step."""
    if group is None:
        return DropRecord(number, verdict.reason, next(iter(most_frequent([verdict.why]))))
    return DropRecord(
        number,
        verdict.reason,
        num_completions=len(group.group.trajectories),
        failures=failures_of([group]),
    )


def _decoded(delivery: Delivery, parts: Mapping[Part, bytes | None]) -> ScoredGroup:
    """The group of a delivery; MalformedMessageError if it holds no group, or the group of another ticket."""
    header = decode(delivery.payload, ScoredHeader)
    if header.group.ticket.key != delivery.ticket_key:
        raise MalformedMessageError(f"a group of ticket {header.group.ticket.key}, sent as {delivery.ticket_key}")
    return scored_group(header, parts)
