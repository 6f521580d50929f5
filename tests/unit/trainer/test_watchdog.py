"""A run that makes no progress ends, and names what it waits for."""

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from penstock.broker.trainer import TrainerQueue
from penstock.contracts import ServiceKind
from penstock.contracts.services import ServiceRecord
from penstock.errors import StallError
from penstock.tickets import TicketBook, TicketLimits
from penstock_trainer.telemetry.status import Status
from penstock_trainer.watchdog import Watchdog
from tests.own_clock import OwnClock

STALL_SECONDS = 60


class FakeQueue:
    """The calls of the queue that the watchdog makes."""

    def __init__(self) -> None:
        self.state = "serving"

    async def services(self) -> list[ServiceRecord]:
        return [ServiceRecord(ServiceKind.ROLLOUT, "rollout-1", "http://r", 1, self.state)]

    async def whereabouts(self, ticket: int) -> str:
        return "which rollout-1 holds from tickets"


@pytest.fixture
def queue() -> FakeQueue:
    return FakeQueue()


@pytest.fixture
async def clock() -> OwnClock:
    return OwnClock()


@pytest.fixture
async def watchdog(queue: FakeQueue, clock: OwnClock) -> Watchdog:
    book = TicketBook(TicketLimits(batch_size=2, max_outstanding=4, num_draws=10))
    book.issue()
    book.arrive(0, has_gradient=True)
    trainer_queue = cast(TrainerQueue, SimpleNamespace(queue=queue))
    status = cast(Status, SimpleNamespace(phase="waiting for a batch", fenced={"rollout-1": "HTTP 502: no"}))
    return Watchdog(trainer_queue, book, status, STALL_SECONDS)


async def ends_within(watchdog: Watchdog, clock: OwnClock, seconds: float) -> bool:
    watching = asyncio.create_task(watchdog.watch_progress())
    await clock.advance(seconds)
    if watching.done():
        assert isinstance(watching.exception(), StallError)
        return True
    watching.cancel()
    return False


async def test_it_names_the_ticket_and_who_holds_it(watchdog: Watchdog, clock: OwnClock) -> None:
    watching = asyncio.create_task(watchdog.watch_progress())
    await clock.advance(2 * STALL_SECONDS)
    with pytest.raises(StallError) as raised:
        await watching
    text = str(raised.value)
    assert "is added), while waiting for a batch: waiting for ticket 1, which rollout-1 holds" in text
    assert "services seen: rollout-1 (serving); fenced at the last push: rollout-1: HTTP 502: no" in text


async def test_progress_keeps_the_run_alive(watchdog: Watchdog, clock: OwnClock) -> None:
    watching = asyncio.create_task(watchdog.watch_progress())
    for _ in range(6):
        await clock.advance(STALL_SECONDS / 2)
        watchdog.progress()
    assert not watching.done()
    watching.cancel()
    assert await ends_within(watchdog, clock, 3 * STALL_SECONDS)


async def test_its_own_computation_is_no_stall(watchdog: Watchdog, clock: OwnClock) -> None:
    with watchdog.computing():
        assert not await ends_within(watchdog, clock, 3 * STALL_SECONDS)
    assert await ends_within(watchdog, clock, 3 * STALL_SECONDS)


async def test_an_engine_that_starts_is_waited_for(watchdog: Watchdog, clock: OwnClock, queue: FakeQueue) -> None:
    queue.state = "starting"
    assert not await ends_within(watchdog, clock, 3 * STALL_SECONDS)
    queue.state = "serving"
    assert await ends_within(watchdog, clock, 3 * STALL_SECONDS)


async def test_the_time_without_progress_is_told(watchdog: Watchdog, clock: OwnClock) -> None:
    await clock.advance(5)
    assert watchdog.idle_seconds == pytest.approx(5)
    with watchdog.computing():
        assert watchdog.idle_seconds == 0
    assert watchdog.idle_seconds == 0
