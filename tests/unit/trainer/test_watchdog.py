"""A run that makes no progress ends and says what it waits for."""

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

STALL_SECONDS = 0.2


class FakeQueue:
    """What the watchdog asks of the queue."""

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
async def watchdog(queue: FakeQueue) -> Watchdog:
    book = TicketBook(TicketLimits(batch_size=2, max_outstanding=4, num_draws=10))
    book.issue()
    book.arrive(0, has_gradient=True)
    trainer_queue = cast(TrainerQueue, SimpleNamespace(queue=queue))
    status = cast(Status, SimpleNamespace(phase="waiting for a batch", fenced={"rollout-1": "HTTP 502: no"}))
    return Watchdog(trainer_queue, book, status, STALL_SECONDS)


async def ends_within(watchdog: Watchdog, seconds: float) -> bool:
    try:
        await asyncio.wait_for(watchdog.watch_progress(), seconds)
    except TimeoutError:
        return False
    except StallError:
        pass
    return True


async def test_it_names_the_ticket_and_who_holds_it(watchdog: Watchdog) -> None:
    with pytest.raises(StallError) as raised:
        async with asyncio.timeout(5):
            await watchdog.watch_progress()
    text = str(raised.value)
    assert "run.stall_seconds), while waiting for a batch: waiting for ticket 1, which rollout-1 holds" in text
    assert "services seen: rollout-1 (serving); fenced at the last push: rollout-1: HTTP 502: no" in text


async def test_progress_keeps_the_run_alive(watchdog: Watchdog) -> None:
    async def work() -> None:
        while True:
            watchdog.progress()
            await asyncio.sleep(STALL_SECONDS / 10)

    working = asyncio.create_task(work())
    assert not await ends_within(watchdog, 3 * STALL_SECONDS)
    working.cancel()
    assert await ends_within(watchdog, 20 * STALL_SECONDS)


async def test_its_own_computation_is_no_stall(watchdog: Watchdog) -> None:
    with watchdog.computing():
        assert not await ends_within(watchdog, 3 * STALL_SECONDS)
    assert await ends_within(watchdog, 20 * STALL_SECONDS)


async def test_an_engine_that_starts_is_waited_for(watchdog: Watchdog, queue: FakeQueue) -> None:
    queue.state = "starting"
    assert not await ends_within(watchdog, 3 * STALL_SECONDS)
    queue.state = "serving"
    assert await ends_within(watchdog, 20 * STALL_SECONDS)


async def test_the_time_without_progress_is_told(watchdog: Watchdog) -> None:
    await asyncio.sleep(0.05)
    assert 0.04 < watchdog.idle_seconds < 5
    with watchdog.computing():
        assert watchdog.idle_seconds == 0
    assert watchdog.idle_seconds < 0.04
