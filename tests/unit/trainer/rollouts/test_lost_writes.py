"""If the queue has lost acknowledged writes, the trainer ends; a late write does not end it."""

from typing import Any

import pytest

from penstock.contracts import PolicyIdentity
from penstock.contracts.services import Announcement
from penstock.errors import LostWritesError
from penstock.tickets import TicketBook, TicketLimits
from penstock_trainer.rollouts.lost_writes import LostWrites
from penstock_trainer.rollouts.versions import Versions


class Queue:
    """The calls of the queue that `look` makes."""

    def __init__(self) -> None:
        self.places: dict[int, str] = {}
        self.ledger_is_whole = True
        self.version = 0
        self.queue = self

    async def ends_as_written(self) -> bool:
        return self.ledger_is_whole

    async def live(self) -> dict[int, str]:
        return dict(self.places)

    async def announced(self) -> Announcement:
        return Announcement(PolicyIdentity(self.version, "d"), "path", 1)


@pytest.fixture
def queue() -> Queue:
    return Queue()


@pytest.fixture
def versions() -> Versions:
    return Versions()


@pytest.fixture
def lost_writes(queue: Queue, versions: Versions) -> LostWrites:
    book = TicketBook(TicketLimits(batch_size=2, max_outstanding=2, num_draws=2))
    queue.places = dict.fromkeys(book.issue(), "tickets|1-1|0")
    fake: Any = queue
    return LostWrites(fake, book, fake, versions, heartbeat_seconds=1.0)


async def test_nothing_is_said_of_a_whole_queue(lost_writes: LostWrites) -> None:
    await lost_writes.look()
    await lost_writes.look()


async def test_a_ticket_without_a_place_at_two_looks_is_lost(lost_writes: LostWrites, queue: Queue) -> None:
    del queue.places[1]
    await lost_writes.look()
    with pytest.raises(LostWritesError, match="ticket 1: missing in the queue"):
        await lost_writes.look()


async def test_a_ticket_that_is_only_late_is_not_lost(lost_writes: LostWrites, queue: Queue) -> None:
    place = queue.places.pop(1)
    await lost_writes.look()
    queue.places[1] = place
    await lost_writes.look()
    del queue.places[1]
    await lost_writes.look()


async def test_a_lost_announcement_is_noticed(lost_writes: LostWrites, versions: Versions) -> None:
    versions.announce(PolicyIdentity(3, "d"))
    await lost_writes.look()
    with pytest.raises(LostWritesError, match="announced version 3"):
        await lost_writes.look()


async def test_a_shortened_ledger_is_noticed_at_once(lost_writes: LostWrites, queue: Queue) -> None:
    queue.ledger_is_whole = False
    with pytest.raises(LostWritesError, match="ledger"):
        await lost_writes.look()
