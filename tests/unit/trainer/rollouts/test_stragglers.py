"""A ticket that holds up a batch is named, in the status at once and in the log at most once an interval."""

import logging

import pytest

from penstock.tickets import TicketBook, TicketLimits
from penstock_trainer.rollouts.stragglers import Stragglers

AFTER_SECONDS = 10.0


class Bench:
    """Four outstanding tickets in batches of two, and a clock that is set by hand."""

    def __init__(self) -> None:
        self.book = TicketBook(TicketLimits(batch_size=2, max_outstanding=4, num_draws=10))
        self.book.issue()
        self.now = 100.0
        self.stragglers = Stragglers(self, self.book, straggler_seconds=AFTER_SECONDS, clock=lambda: self.now)

    async def whereabouts(self, ticket: int) -> str:
        return f"which rollout-{ticket} holds from tickets"

    async def look(self, seconds: float = 0.0) -> str:
        self.now += seconds
        await self.stragglers.look()
        return self.stragglers.straggler

    def arrive(self, *numbers: int) -> None:
        for number in numbers:
            self.book.arrive(number, has_gradient=True)


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def test_the_age_is_that_of_the_oldest_waiting_ticket(bench: Bench) -> None:
    await bench.look()
    await bench.look(3)
    assert bench.stragglers.oldest_seconds == 3
    bench.arrive(0, 1)
    bench.book.announce(bench.book.commit([0, 1]) + 1)
    await bench.look(1)
    assert bench.stragglers.oldest_seconds == 4  # ticket 2
    bench.book.issue()
    bench.arrive(2, 3)
    await bench.look(1)
    assert bench.stragglers.oldest_seconds == 0  # ticket 4, seen for the first time
    bench.arrive(4, 5)
    await bench.look(1)
    assert bench.stragglers.oldest_seconds == 0


async def test_a_ticket_that_is_issued_again_waits_anew(bench: Bench) -> None:
    await bench.look()
    bench.arrive(0)
    await bench.look(5)
    bench.book.wait_again(0)
    await bench.look(5)
    assert bench.stragglers.oldest_seconds == 0


async def test_a_straggler_is_named_with_its_holder_and_times(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    await bench.look()
    await bench.look(30)
    assert bench.stragglers.straggler == ""  # it waits, and nothing waits for it alone
    bench.arrive(1, 2)
    assert await bench.look() == ""
    assert await bench.look(AFTER_SECONDS - 1) == ""
    expected = (
        "ticket 0, which rollout-0 holds from tickets: it has been waiting for 40 s and has held up a batch, whose "
        "other groups are here, for 10 s"
    )
    assert await bench.look(1) == expected
    assert [record.getMessage() for record in caplog.records] == [f"a batch waits for {expected}"]
    bench.arrive(0)
    assert await bench.look(1) == ""


async def test_it_is_logged_once_an_interval(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.arrive(1)
    with caplog.at_level(logging.WARNING):
        for _ in range(36):
            await bench.look(1)
    assert len(caplog.records) == 3
    assert {record.levelname for record in caplog.records} == {"WARNING"}


async def test_another_straggler_has_its_own_time(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.arrive(2, 3)
    await bench.look()
    await bench.look(AFTER_SECONDS)
    bench.arrive(0)
    assert await bench.look(1) == ""  # it is ticket 1 now, since a moment ago
    assert (await bench.look(AFTER_SECONDS)).startswith("ticket 1, which rollout-1 holds")
    assert len(caplog.records) == 2
