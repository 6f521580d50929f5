"""A ticket that blocks a batch is named: in the status at once, in the log at most once per interval."""

import logging

import pytest

from penstock.tickets import TicketBook, TicketLimits
from penstock_trainer.rollouts.stragglers import Stragglers

AFTER_SECONDS = 10.0


class StragglerSetup:
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
def setup() -> StragglerSetup:
    return StragglerSetup()


async def test_the_age_is_that_of_the_oldest_waiting_ticket(setup: StragglerSetup) -> None:
    await setup.look()
    await setup.look(3)
    assert setup.stragglers.oldest_seconds == 3
    setup.arrive(0, 1)
    setup.book.announce(setup.book.commit([0, 1]) + 1)
    await setup.look(1)
    assert setup.stragglers.oldest_seconds == 4  # ticket 2
    setup.book.issue()
    setup.arrive(2, 3)
    await setup.look(1)
    assert setup.stragglers.oldest_seconds == 0  # ticket 4, seen for the first time
    setup.arrive(4, 5)
    await setup.look(1)
    assert setup.stragglers.oldest_seconds == 0


async def test_a_ticket_that_is_issued_again_waits_anew(setup: StragglerSetup) -> None:
    await setup.look()
    setup.arrive(0)
    await setup.look(5)
    setup.book.wait_again(0)
    await setup.look(5)
    assert setup.stragglers.oldest_seconds == 0


async def test_a_straggler_is_named_with_its_holder_and_times(
    setup: StragglerSetup, caplog: pytest.LogCaptureFixture
) -> None:
    await setup.look()
    await setup.look(30)
    assert setup.stragglers.straggler == ""  # it is missing, but it alone does not block a batch
    setup.arrive(1, 2)
    assert await setup.look() == ""
    assert await setup.look(AFTER_SECONDS - 1) == ""
    expected = (
        "ticket 0, which rollout-0 holds from tickets: it has been waiting for 40 s and has held up a batch, whose "
        "other groups are here, for 10 s"
    )
    assert await setup.look(1) == expected
    assert [record.getMessage() for record in caplog.records] == [f"a batch waits for {expected}"]
    setup.arrive(0)
    assert await setup.look(1) == ""


async def test_it_is_logged_once_an_interval(setup: StragglerSetup, caplog: pytest.LogCaptureFixture) -> None:
    setup.arrive(1)
    with caplog.at_level(logging.WARNING):
        for _ in range(36):
            await setup.look(1)
    assert len(caplog.records) == 3
    assert {record.levelname for record in caplog.records} == {"WARNING"}


async def test_another_straggler_has_its_own_time(setup: StragglerSetup, caplog: pytest.LogCaptureFixture) -> None:
    setup.arrive(2, 3)
    await setup.look()
    await setup.look(AFTER_SECONDS)
    setup.arrive(0)
    assert await setup.look(1) == ""  # now it is ticket 1, and only just
    assert (await setup.look(AFTER_SECONDS)).startswith("ticket 1, which rollout-1 holds")
    assert len(caplog.records) == 2
