"""When an environment counts as failing, and how it is tried then."""

import asyncio
from collections.abc import Callable

import pytest

from penstock_agent.episodes.breaker import MAX_COOL_DOWN_SECONDS, Breaker
from tests.patience import ANSWER_SECONDS


def make_breaker(cool_down_seconds: float = 0.01) -> tuple[Breaker, list[bool]]:
    changes: list[bool] = []
    return Breaker(changes.append, limit=4, cool_down_seconds=cool_down_seconds), changes


def fail(breaker: Breaker, *tickets: str) -> None:
    for ticket in tickets:
        breaker.failed(ticket, "the sandbox is away\nat line 3")


async def test_failures_in_a_row_of_several_tickets_open_it() -> None:
    breaker, changes = make_breaker()
    fail(breaker, *"11111111")
    assert not breaker.is_open, "one row at fault keeps all others back"
    breaker.worked("2")
    fail(breaker, *"234234234")
    assert not breaker.is_open, "rows at fault are the last to end, and alone then"
    fail(breaker, "5")
    assert breaker.is_open
    assert str(breaker) == "10 attempts failed in a row, the last: the sandbox is away at line 3"
    assert changes == [True]


async def test_what_works_between_failures_keeps_it_closed() -> None:
    breaker, changes = make_breaker()
    for _ in range(5):
        fail(breaker, *"123")
        breaker.worked("1")
    assert not await breaker.admission("1")
    assert changes == []


async def test_one_attempt_at_a_time_probes_and_they_take_turns() -> None:
    breaker, _ = make_breaker()
    fail(breaker, *"1234")
    order: list[str] = []
    num_probing = 0

    async def attempts(name: str, rounds: int) -> None:
        nonlocal num_probing
        for _ in range(rounds):
            assert await breaker.admission(name)
            num_probing += 1
            assert num_probing == 1
            await asyncio.sleep(0)
            order.append(name)
            fail(breaker, name)
            num_probing -= 1
            breaker.probe_ended()

    async with asyncio.timeout(ANSWER_SECONDS), asyncio.TaskGroup() as group:
        for name in "abc":
            group.create_task(attempts(name, 2))
    assert order == [*"abcabc"]


async def test_a_probe_that_works_lets_all_go_on() -> None:
    breaker, changes = make_breaker()
    fail(breaker, *"1234")
    async with asyncio.timeout(ANSWER_SECONDS):
        waiting = [asyncio.create_task(breaker.admission(ticket)) for ticket in "123"]
        assert await waiting[0]
        assert breaker.num_waiting == 2
        breaker.worked("1")
        breaker.probe_ended()
        assert [await task for task in waiting] == [True, False, False]
    assert changes == [True, False]
    assert not await breaker.admission("1")


async def test_an_attempt_that_was_running_may_close_it_before_any_probe() -> None:
    breaker, _ = make_breaker(cool_down_seconds=3600)
    fail(breaker, *"1234")
    waiting = asyncio.create_task(breaker.admission("5"))
    await asyncio.sleep(0)
    breaker.worked("1")
    async with asyncio.timeout(ANSWER_SECONDS):
        assert not await waiting


async def test_a_probe_that_outlives_its_outage_leaves_one_cool_down_to_the_next() -> None:
    breaker, _ = make_breaker()
    fail(breaker, *"1234")
    async with asyncio.timeout(ANSWER_SECONDS):
        assert await breaker.admission("5")
    breaker.worked("6")  # an attempt that was running
    fail(breaker, *"789a")
    first = breaker._timer
    breaker.probe_ended()
    assert first is not None
    assert first.cancelled()
    assert breaker._timer is not first


@pytest.mark.parametrize("when", ["waiting", "admitted"])
async def test_an_attempt_that_is_cancelled_leaves_its_turn_to_the_next(when: str) -> None:
    breaker, _ = make_breaker()
    fail(breaker, *"1234")
    first = asyncio.create_task(breaker.admission("5"))
    second = asyncio.create_task(breaker.admission("6"))
    await asyncio.sleep(0)
    if when == "admitted":
        while breaker.num_waiting == 2:  # noqa: ASYNC110  # the future is set, its task has not run yet
            await asyncio.sleep(0)
    first.cancel()
    async with asyncio.timeout(ANSWER_SECONDS):
        assert await second
    assert first.cancelled()


def test_a_long_reason_keeps_its_end() -> None:
    breaker = Breaker(lambda is_open: None)
    breaker.failed("1", "the agent ended with exit code 1; it wrote: " + "  File x\n" * 99 + "ValueError: no tools")
    assert str(breaker).startswith(
        "1 attempts failed in a row, the last: the agent ended with exit code 1; it wrote: File x"
    )
    assert str(breaker).endswith("File x ValueError: no tools")
    assert len(str(breaker)) < 300


async def test_a_ticket_that_fails_while_others_work_is_at_fault_itself() -> None:
    breaker, changes = make_breaker(cool_down_seconds=3600)
    fail(breaker, *"1234")
    breaker.worked("9")
    assert changes == [True, False]
    fail(breaker, *"1234")
    assert not breaker.is_open
    breaker.worked("4")
    fail(breaker, *"4567")
    assert breaker.is_open, "a ticket of which an attempt has worked counts again"
    async with asyncio.timeout(ANSWER_SECONDS):
        assert not await breaker.admission("1"), "it waits for what it cannot show"
    waiting = asyncio.create_task(breaker.admission("4"))
    await asyncio.sleep(0)
    assert breaker.num_waiting == 1
    waiting.cancel()


async def test_a_ticket_that_has_worked_is_not_at_fault_for_one_failure() -> None:
    breaker, _ = make_breaker(cool_down_seconds=3600)
    breaker.worked("1")
    fail(breaker, "1")
    breaker.worked("2")
    fail(breaker, *"1345")
    assert breaker.is_open


async def test_each_probe_that_fails_makes_the_next_wait_longer_and_a_new_outage_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    waits: list[float] = []

    def at_once(seconds: float, then: Callable[[], None]) -> asyncio.Handle:
        waits.append(seconds)
        return loop.call_soon(then)

    monkeypatch.setattr(loop, "call_later", at_once)
    breaker, _ = make_breaker(cool_down_seconds=50.0)
    fail(breaker, *"1234")
    for ticket in "567":
        async with asyncio.timeout(ANSWER_SECONDS):
            assert await breaker.admission(ticket)
        fail(breaker, ticket)
        breaker.probe_ended()
    assert waits == [50.0, 100.0, MAX_COOL_DOWN_SECONDS, MAX_COOL_DOWN_SECONDS]
    breaker.worked("8")
    fail(breaker, *"abcd")
    assert waits[4:] == [50.0]


async def test_tickets_that_have_not_failed_probe_first() -> None:
    breaker, _ = make_breaker()
    fail(breaker, *"1234")
    async with asyncio.timeout(ANSWER_SECONDS):
        first, other = (asyncio.create_task(breaker.admission(ticket)) for ticket in "15")
        assert await other
        breaker.worked("5")
        breaker.probe_ended()
        assert not await first


async def test_tickets_of_which_many_attempts_wait_probe_in_turn() -> None:
    breaker, _ = make_breaker()
    fail(breaker, *"1234")
    async with asyncio.timeout(ANSWER_SECONDS):
        first, again, other = (asyncio.create_task(breaker.admission(ticket)) for ticket in "112")
        assert await first
        fail(breaker, "1")
        breaker.probe_ended()
        assert await other
    assert not again.done()
    again.cancel()


async def test_a_row_at_fault_ends_after_two_probes_though_nothing_else_runs() -> None:
    breaker, _ = make_breaker()
    fail(breaker, *"1234")
    async with asyncio.timeout(ANSWER_SECONDS):
        attempts = [asyncio.create_task(breaker.admission("1")) for _ in range(4)]
        for probing in attempts[:2]:
            assert await probing
            fail(breaker, "1")
            breaker.probe_ended()
        assert [await each for each in attempts[2:]] == [False, False]
        assert not await breaker.admission("1")
    assert breaker.is_open
