"""The loop from tickets to groups of episodes.

Invariants: every ticket that is taken is handed over, buried or given back; a finished episode is kept at once, so that
whoever has the ticket next makes only those that are missing; a group has an episode for each seed, if only a failed
one.

    TICKETS, EVAL --take--> decode --> G episodes, those that are kept already left out --hand over--> ROLLOUTS
                              |             |-- finished --> kept beside the ticket
                              |             '-- stopped --> the ticket goes back, with what is finished
                              '--malformed--> dead

    Backpressure: `Room` bounds the episodes that run, and a ticket is taken only if its group has room. While no server
    can answer, episodes wait, and nothing fails for it; while the environment fails, `Breaker` lets one at a time try.

Heartbeat and renewal of what is held: `penstock.broker.Worker.keep_alive`.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Protocol

from penstock.broker import Delivery, Stage
from penstock.contracts import Episode, MalformedMessageError, RolloutGroup, Ticket, decode, encode
from penstock.contracts.services import Announcement
from penstock_agent.episodes.room import Due, Room
from penstock_agent.metrics import GroupOutcome

log = logging.getLogger(__name__)

DRAIN_SECONDS = 10.0  # at the end: tickets whose episodes have not ended by then are given back

Announced = Callable[[], Awaitable[Announcement | None]]


class TicketQueue(Protocol):
    """The part of `penstock.broker.Worker` that the loop uses."""

    async def take(self, *stages: Stage) -> Delivery | None: ...

    async def wait(self, *, timeout_seconds: float) -> None: ...

    @property
    def ask_seconds(self) -> float: ...

    async def store_episode(self, delivery: Delivery, index: int, data: bytes) -> bool: ...

    async def stored_episodes(self, delivery: Delivery) -> dict[int, bytes]: ...

    async def hand_over(self, delivery: Delivery, message: RolloutGroup, to: Stage) -> bool: ...

    async def give_back(self, delivery: Delivery) -> None: ...

    async def bury(self, delivery: Delivery, reason: str) -> bool: ...

    def forget(self, delivery: Delivery) -> None: ...


class Episodes(Protocol):
    """`attempts.Attempts`."""

    async def episode(self, ticket: Ticket, index: int, lease: int) -> Episode: ...


class GroupMetrics(Protocol):
    """What is counted of groups."""

    def group_ended(self, outcome: GroupOutcome, num_kept: int = 0) -> None:
        """num_kept: of its episodes, those that an earlier holder of the ticket had finished."""


class LateError(Exception):
    """The ticket is another worker's by now."""


class Producer:
    """Makes groups of episodes."""

    def __init__(
        self,
        tickets: TicketQueue,
        announced: Announced,
        episodes: Episodes,
        room: Room,
        metrics: GroupMetrics,
        *,
        environment: str,
        server: str,
    ) -> None:
        """environment: the one that tickets must name. server: the name that groups carry."""
        self._tickets = tickets
        self._announced = announced
        self._episodes = episodes
        self._room = room
        self._metrics = metrics
        self._environment = environment
        self._server = server

    async def produce_groups(self, stop: asyncio.Event) -> None:
        """Make groups, several at once, until `stop` is set; then finish the held tickets or give them back."""
        try:
            async with asyncio.timeout(None) as patience, asyncio.TaskGroup() as tasks:
                stopping = tasks.create_task(stop.wait())
                while not stop.is_set():
                    if self._room.is_full:
                        room = tasks.create_task(self._room.room())
                        await asyncio.wait({stopping, room}, return_when=asyncio.FIRST_COMPLETED)
                        room.cancel()
                    elif (delivery := await self._tickets.take(*self._room.order())) is None:
                        ask_seconds = self._tickets.ask_seconds
                        waiting = tasks.create_task(self._tickets.wait(timeout_seconds=ask_seconds))
                        await asyncio.wait({stopping, waiting}, return_when=asyncio.FIRST_COMPLETED)
                        waiting.cancel()
                    elif (ticket := await self._decode(delivery)) is not None:
                        tasks.create_task(
                            self._produce(delivery, ticket, self._room.enter(delivery.stage, len(ticket.seeds)))
                        )
                patience.reschedule(asyncio.get_running_loop().time() + DRAIN_SECONDS)
        except TimeoutError:
            log.warning(
                "stopped with episodes that had not ended after %g s; their tickets were given back", DRAIN_SECONDS
            )

    async def _decode(self, delivery: Delivery) -> Ticket | None:
        try:
            ticket = decode(delivery.payload, Ticket)
            if ticket.environment != self._environment:
                raise MalformedMessageError(
                    f"a ticket for {ticket.environment or 'completions'!r}; this service has {self._environment!r}"
                )
            return ticket
        except MalformedMessageError as error:
            await self._tickets.bury(delivery, delivery.reason or str(error))
            self._metrics.group_ended("malformed")
            return None

    async def _produce(self, delivery: Delivery, ticket: Ticket, due: Due) -> None:
        started_at, began = time.time(), time.monotonic()
        try:
            kept = await self._kept(delivery, ticket)
            due.change(-len(kept))
            made = await self._made(delivery, ticket, kept, due)
            if made is None:
                self._tickets.forget(delivery)
                self._metrics.group_ended("late")
                return
            episodes = tuple(episode for _, episode in sorted({**kept, **made}.items()))
            ended_at = started_at + time.monotonic() - began  # also if the time of day was set meanwhile
            group = RolloutGroup(ticket, (), self._server, started_at, ended_at, episodes=episodes)
            published = await self._tickets.hand_over(delivery, group, Stage.ROLLOUTS)
            self._metrics.group_ended("published" if published else "late", len(kept))
        except asyncio.CancelledError:
            await self._tickets.give_back(
                delivery
            )  # free for others at once, not only when this service counts as dead
            self._metrics.group_ended("returned")
            raise
        finally:
            due.all_ended()

    async def _kept(self, delivery: Delivery, ticket: Ticket) -> dict[int, Episode]:
        """The episodes that earlier holders of the ticket have finished."""
        kept = {}
        for index, data in (await self._tickets.stored_episodes(delivery)).items():
            try:
                kept[index] = decode(data, Episode)
            except MalformedMessageError as error:
                log.warning(
                    "episode %s/%d is made again: what is kept of it is malformed: %s", ticket.key, index, error
                )
        if kept:
            log.info("ticket %s: %d of %d episodes are kept", ticket.key, len(kept), len(ticket.seeds))
        return kept

    async def _made(
        self, delivery: Delivery, ticket: Ticket, kept: Collection[int], due: Due
    ) -> dict[int, Episode] | None:
        """The other episodes; None if another worker has the ticket."""
        lease = lease_for(ticket, await self._announced())
        missing = [index for index in range(len(ticket.seeds)) if index not in kept]
        is_late = False
        try:
            async with asyncio.TaskGroup() as group:
                making = {index: group.create_task(self._one(delivery, ticket, index, lease, due)) for index in missing}
        except* LateError:
            is_late = True
        return None if is_late else {index: task.result() for index, task in making.items()}

    async def _one(self, delivery: Delivery, ticket: Ticket, index: int, lease: int, due: Due) -> Episode:
        async with self._room.running:
            episode = await self._episodes.episode(ticket, index, lease)
        if not await self._tickets.store_episode(delivery, index, encode(episode)):
            raise LateError
        due.change(-1)
        return episode


def lease_for(ticket: Ticket, announced: Announcement | None) -> int:
    """The lease of which calls need the ticket's version or a newer one; of a higher lease any version will do.

    A trainer that took over may have gone back, to versions before the ticket's: then any of its own.
    """
    if announced is None:
        return 0
    return announced.lease if announced.identity.number >= ticket.policy_version else announced.lease - 1
