"""A consumer with issued tickets on a real queue; the test puts messages into its stream by hand."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from penstock.broker import Stage, Worker
from penstock.broker.dead import DeadLetters
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import (
    Completion,
    DropReason,
    PolicyIdentity,
    RolloutGroup,
    Sampling,
    Score,
    ScoredGroup,
    Ticket,
    VersionSpan,
    decode,
    pack_float32,
    pack_int32,
)
from penstock.contracts.services import Announcement
from penstock.contracts.stored_groups import Stored
from penstock.records.files import DEAD_FILE
from penstock.tickets import TicketBook, TicketLimits, TicketState
from penstock_trainer.data.drawing.draws import Draws
from penstock_trainer.data.prompts import EncodedPrompt
from penstock_trainer.grpo import varies
from penstock_trainer.rollouts.buried import BuriedMessages
from penstock_trainer.rollouts.consumer import Consumer
from penstock_trainer.rollouts.evaluation import Evaluation
from penstock_trainer.rollouts.generation_time import GenerationTime
from penstock_trainer.rollouts.issuing import Issuer
from penstock_trainer.rollouts.judge import Rules
from penstock_trainer.rollouts.versions import Versions
from penstock_trainer.telemetry.last_lines import LastLines
from penstock_trainer.telemetry.metrics import TrainerMetrics
from tests.integration.broker.queue_setup import put, stored_scored
from tests.patience import ANSWER_SECONDS
from tests.unit.trainer.numbered_prompts import eval_set

BATCH_SIZE, CREDITS, NUM_PROMPTS = 2, 4, 40
OLD, POLICY = PolicyIdentity(0, "a" * 16), PolicyIdentity(1, "b" * 16)
PROMPTS = [EncodedPrompt(f"p{n}", (n + 1,), "a", "", {}) for n in range(NUM_PROMPTS)]


def dead_file(folder: Path) -> LastLines:
    return LastLines(folder / DEAD_FILE)


class ConsumerSetup:
    """A consumer with issued tickets, and methods that put messages into its stream."""

    def __init__(
        self,
        trainer_queue: TrainerQueue,
        config: Config,
        *,
        dynamic_sampling: bool = False,
        order: Literal["ticket", "ready"] = "ticket",
        max_lag: int | None = None,
        begun: bool = True,
        has_kl_term: bool = False,
        folder: Path | None = None,
    ) -> None:
        """`begun`: two versions are known, and which tickets are outstanding; else `begin` is still to be called.

        `has_kl_term`: every group has a gradient, whatever its rewards are. `folder`: in which dead letters are noted.
        """
        self.trainer_queue, self.queue = trainer_queue, trainer_queue.queue
        self.sampling = Sampling(1.0, 4, (2,))
        of_episodes = config.agent.enabled
        prompts = [replace(each, token_ids=()) for each in PROMPTS] if of_episodes else PROMPTS
        max_failure_share = config.agent.max_failure_share if of_episodes else 1.0
        self.draws = Draws(prompts, self.sampling, config)
        self.book = TicketBook(
            TicketLimits(BATCH_SIZE, CREDITS, self.draws.num_draws, order=order, max_failure_share=max_failure_share)
        )
        self.worker = Worker(self.queue, "trainer", config.staleness, take_over=True)
        held_out = eval_set(prompts[:1], Sampling(0.0, 8, (2,)), config.eval.main)
        self.evaluation = Evaluation([held_out], trainer_queue.lease.number, config)
        self.metrics = TrainerMetrics()
        self._buried = None if folder is None else BuriedMessages(DeadLetters(self.queue), dead_file(folder))
        self.dropped: list[tuple[DropReason, ScoredGroup | None]] = []
        self.generation, self.versions, self.changed = GenerationTime(), Versions(), asyncio.Event()
        self.issuer = Issuer(trainer_queue, self.draws, self.book, self.versions, self.metrics.queue)
        self.consumer = Consumer(
            trainer_queue,
            self.worker,
            self.book,
            self.issuer,
            self.versions,
            self.evaluation,
            self.generation,
            self.changed,
            Rules(
                has_gradient=lambda group: has_kl_term or varies([score.value for score in group.scores]),
                has_advantage=lambda group: varies([score.value for score in group.scores]),
                sampling=self.sampling,
                dynamic_sampling=dynamic_sampling,
                max_staleness=1,
                order=order,
                max_lag=max_lag,
            ),
            self.metrics.queue,
            drop=trainer_queue.drop,
            dropped=lambda reason, group: self.dropped.append((reason, group)),
            buried=self._note_buried,
        )
        if begun:
            self.begin()

    async def _note_buried(self) -> None:
        if self._buried is not None:
            await self._buried.note()

    def begin(self) -> None:
        self.versions.restore({0: OLD, 1: POLICY})
        self.versions.announce(POLICY)
        self.consumer.begin()

    async def issue(self) -> None:
        tickets = [self.draws.ticket(number, attempt=0, policy_version=1) for number in self.book.issue()]
        await self.trainer_queue.issue(tickets, Announcement(POLICY, "/weights/1", self.trainer_queue.lease.number))

    async def deliver(self, key: str, form: Stored) -> None:
        await put(self.queue, Stage.SCORED, key, form)

    async def answer(
        self,
        number: int,
        values: Sequence[float | None] = (1.0, 0.0),
        policy: PolicyIdentity = POLICY,
        *newer: PolicyIdentity,
    ) -> None:
        """One group, whose completions have one token by each policy."""
        ticket = self.draws.ticket(number, attempt=0, policy_version=1)
        await self.deliver(str(number), stored_scored(scored(ticket, values, policy, *newer)))

    @contextlib.asynccontextmanager
    async def consuming(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.consumer.consume_groups())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(ANSWER_SECONDS):
            while not condition():
                self.changed.clear()
                if not condition():
                    await self.changed.wait()

    async def depth(self, stream: str) -> int:
        return (await self.queue.depths())[stream]

    async def issued_tickets(self) -> list[Ticket]:
        stream = self.queue.keys.stream(Stage.TICKETS)
        entries = await self.queue.guard(self.queue.client.xrange(stream))
        return [decode(fields[b"p"], Ticket) for _, fields in entries]

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"penstock_{name}_total", labels) or 0.0

    @property
    def arrived(self) -> list[int]:
        return [number for number, state in self.book.outstanding.items() if state is TicketState.ARRIVED]


def scored(
    ticket: Ticket, values: Sequence[float | None], policy: PolicyIdentity, *newer: PolicyIdentity
) -> ScoredGroup:
    policies = (policy, *newer)
    count = len(policies)
    spans = tuple(VersionSpan(policy, t, t + 1) for t, policy in enumerate(policies))
    tokens, logprobs = pack_int32([5] * count), pack_float32([-0.5] * count)
    completion = Completion(tokens, b"\x01" * count, logprobs, spans, "5" * count, "stop")
    group = RolloutGroup(ticket, (completion,) * len(values), "server", 1.0, 2.0)
    scores = tuple(Score(None, "it raised") if value is None else Score(value) for value in values)
    return ScoredGroup(group, scores, ("exact_match",))
