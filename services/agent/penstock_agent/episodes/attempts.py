"""One episode: attempts with a fresh environment and a fresh session each, until one is not a failure.

Owns what ends an attempt. Invariants: an attempt leaves no process and no session behind, however it ends; it has a
deadline, of which the time does not count in which no server could have answered; an episode has a score or a reason
why it has none, and of one without a score no token is trained.
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from random import Random
from typing import Any, Protocol

import msgspec

from penstock.config.agent import AgentSection
from penstock.contracts import Episode, EpisodeCounts, EpisodeEnd, Node, Score, Ticket
from penstock_agent.environments.episode import Driver, Ending
from penstock_agent.episodes.breaker import Breaker
from penstock_agent.episodes.conversation import AgentSession, Conversation
from penstock_agent.episodes.watch import Watch
from penstock_agent.generation.waits import Waits

log = logging.getLogger(__name__)

BACK_OFF_SECONDS = 0.5  # before the second attempt; doubled before each further one
MAX_BACK_OFF_SECONDS = 10.0
LEAST_BACK_OFF = 0.5  # of the full one: jitter, so that siblings do not return all at once
LEAST_WAIT_SECONDS = 0.05  # between two looks at a deadline that moves
INFRASTRUCTURE: tuple[EpisodeEnd, ...] = ("failure", "timeout")
"""Ends of attempts that may go better the next time. A first call that is too long would be too long again."""


class Session(AgentSession, Protocol):
    """The part of `gateway.Session` that the loop uses."""

    @property
    def waits(self) -> Waits: ...

    @property
    def asked_tools(self) -> tuple[str, ...]: ...

    def end_turns(self) -> None: ...

    def nodes(self) -> tuple[Node, ...]: ...

    def counts(self) -> EpisodeCounts: ...

    def transcript(self) -> str: ...


class Sessions(Protocol):
    """`gateway.Sessions`."""

    def open(
        self, ticket: Ticket, *, episode: int, attempt: int, lease: int
    ) -> AbstractAsyncContextManager[Session]: ...


class EpisodeMetrics(Protocol):
    """What is counted of episodes."""

    def attempt_ended(self, end: EpisodeEnd, *, has_score: bool, seconds: float, model_seconds: float) -> None:
        """model_seconds: of its `seconds`, those in which a call of the model ran."""

    def episode_ended(self, episode: Episode) -> None: ...


class Attempts:
    """Makes episodes of one environment."""

    def __init__(
        self,
        section: AgentSection,
        sessions: Sessions,
        driver: Driver,
        breaker: Breaker,
        watch: Watch,
        metrics: EpisodeMetrics,
        away_seconds: Callable[[], float],
    ) -> None:
        """away_seconds: for how long, in all, no server could have answered; read again and again."""
        self._section = section
        self._sessions = sessions
        self._driver = driver
        self._breaker = breaker
        self._watch = watch
        self._metrics = metrics
        self._away_seconds = away_seconds
        self._random = Random()

    async def episode(self, ticket: Ticket, index: int, lease: int) -> Episode:
        """The episode of a ticket's seed. lease: that of the trainer when the ticket was taken."""
        for attempt in range(self._section.max_attempts):
            if attempt:
                await asyncio.sleep(self._back_off_seconds(attempt))
            probes = await self._breaker.admission(ticket.key)
            try:
                episode = await self._attempt(ticket, index, attempt, lease)
                if episode.score.value is not None or episode.end not in INFRASTRUCTURE:
                    self._breaker.worked(ticket.key)
                    break
                self._breaker.failed(ticket.key, episode.score.failure)
            finally:
                if probes:
                    self._breaker.probe_ended()
            log.warning(
                "episode %s/%d: attempt %d of %d failed (%s): %s",
                ticket.key,
                index,
                attempt + 1,
                self._section.max_attempts,
                episode.end,
                episode.score.failure,
                extra={"ticket": ticket.key},
            )
        self._metrics.episode_ended(episode)
        return episode

    def _back_off_seconds(self, attempt: int) -> float:
        longest = min(MAX_BACK_OFF_SECONDS, BACK_OFF_SECONDS * 2.0 ** (attempt - 1))
        return longest * self._random.uniform(LEAST_BACK_OFF, 1.0)

    async def _attempt(self, ticket: Ticket, index: int, attempt: int, lease: int) -> Episode:
        started_at, began = time.time(), time.monotonic()
        async with self._sessions.open(ticket, episode=index, attempt=attempt, lease=lease) as session:
            conversation = Conversation(session, f"{ticket.key}/{index}")
            with self._watch.over(conversation.name, session):
                ending = await self._ending(row_of(ticket), session, conversation)
        seconds = time.monotonic() - began
        episode = _episode(session, ending, attempt, (started_at, started_at + seconds))
        has_score = episode.score.value is not None
        self._metrics.attempt_ended(
            episode.end, has_score=has_score, seconds=seconds, model_seconds=session.waits.seconds
        )
        return episode

    async def _ending(self, row: dict[str, Any], session: Session, conversation: Conversation) -> Ending:
        """Drive the episode until its end or its deadline."""
        section, away_before = self._section, self._away_seconds()
        deadline = time.monotonic() + section.timeout_seconds
        async with asyncio.TaskGroup() as group:
            driving = group.create_task(self._driven(row, conversation))
            while not driving.done() and (left := deadline + self._away_seconds() - away_before - time.monotonic()) > 0:
                await asyncio.wait({driving}, timeout=max(left, LEAST_WAIT_SECONDS))
            if driving.done():
                return driving.result()
            if section.on_timeout == "score":
                session.end_turns()
                await asyncio.wait({driving}, timeout=section.call_timeout_seconds)
            ended = driving.result() if driving.done() else None
            driving.cancel()
        if section.on_timeout == "failure" or not session.num_turns:  # without an answer there is nothing to train
            return Ending(Score(None, f"no end after {section.timeout_seconds:g} s (agent.timeout_seconds)"), "timeout")
        if ended is None:
            return Ending(Score(section.cut_score), "timeout")
        return dataclasses.replace(ended, end="timeout") if ended.score.value is not None else ended

    async def _driven(self, row: dict[str, Any], conversation: Conversation) -> Ending:
        try:
            return await self._driver.run(row, conversation)
        except Exception as error:
            log.exception("episode %s failed by a defect", conversation.name)
            return Ending(Score(None, f"{type(error).__name__}: {error}"), "failure")


def row_of(ticket: Ticket) -> dict[str, Any]:
    """The row as the environment gets it. Its prompt, if it has one, is in the metadata; the ticket's is for people."""
    return {"answer": ticket.answer, **ticket.metadata}


def _episode(session: Session, ending: Ending, attempt: int, between: tuple[float, float]) -> Episode:
    """What an attempt was. A failed one has no nodes: nothing of it is trained, and its tokens count for no figure."""
    nodes, score, end = session.nodes(), ending.score, ending.end
    if score.value is not None and not any(node.is_sampled for node in nodes):
        score, end = Score(None, f"it ended ({end}) without an answer of the model; expected at least one"), "failure"
    counts = session.counts()
    counts = msgspec.structs.replace(
        counts,
        num_failed_tool_calls=counts.num_failed_tool_calls + ending.num_failed_tool_calls,
        num_attempts=attempt + 1,
    )
    return Episode(nodes if score.value is not None else (), score, end, counts, *between, text=session.transcript())
