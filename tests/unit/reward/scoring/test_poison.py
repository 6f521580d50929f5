"""A completion on which a function hangs is not an outage: what opens a breaker, and what does not keep it open."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from penstock_reward.processes.messages import Call, Outcome
from penstock_reward.score_groups import score_groups
from penstock_reward.scoring.breaker import MOST_HANGS, Breakers
from penstock_reward.scoring.permits import Permits
from tests.patience import ANSWER_SECONDS
from tests.unit.reward.scoring.test_breaker import ANSWERED, Queue, Server, ServerScoring, until
from tests.unit.reward.scoring.test_scoring import OK, FakeRunner, group

HUNG = Outcome(None, 10.0, "timeout", "killed after 10 s")


class Poisoned(Server):
    """A server that hangs on completions that begin with "bad", and on all while it is down."""

    def __init__(self) -> None:
        super().__init__()
        self.rule = self.hang
        self.is_down = False

    def hang(self, call: Call, attempt: int) -> Outcome:
        return HUNG if self.is_down or self.completions[-1][1].startswith("bad") else OK


MINE = {"functions": {"mine:f": 1.0}, "breaker_failures": 3, "max_attempts": 3}
BAD = ("bad a", "bad b", "bad c", "bad d")


@pytest.mark.parametrize("place", [0, 1, 4])
async def test_one_prompt_on_which_the_function_hangs_opens_nothing(place: int) -> None:
    """If it comes first, no call was answered before; if it comes last, no other group is left as a probe."""
    setup = ServerScoring(server := Poisoned(), **MINE)
    groups = [group(number, BAD if number == place else ("7", "8")) for number in range(5)]
    queue = Queue(*groups)
    async with asyncio.timeout(ANSWER_SECONDS), asyncio.TaskGroup() as tasks:
        tasks.create_task(score_groups(queue, setup.scoring, setup.metrics, queue.stop, Permits(1, max_parked=4)))
        await until(lambda: len(queue.handed_over) == 5)
        queue.stop.set()
    scores = [[score.value for score in queue.handed_over[str(number)].scores] for number in range(5)]
    assert scores == [[None] * 4 if number == place else [1.0, 1.0] for number in range(5)]
    assert setup.open("mine:f") == 0
    assert sum(text.startswith("bad") for _, text in server.completions) == 4 * 3, "its own attempts, and no more"


async def test_when_everything_hangs_the_breaker_opens_and_parks_the_poisonous_prompt_too() -> None:
    setup = ServerScoring(server := Poisoned(), **MINE)
    await setup.scoring.score("p", ["7"], "7", "", {})
    server.is_down = True
    queue = Queue(group(0, BAD), group(1, ("7", "8")), group(2))
    async with asyncio.timeout(ANSWER_SECONDS), asyncio.TaskGroup() as tasks:
        tasks.create_task(score_groups(queue, setup.scoring, setup.metrics, queue.stop, Permits(1, max_parked=4)))
        await until(lambda: len(server.rounds) > 20)
        assert setup.open("mine:f") == 1
        assert not queue.handed_over
        server.is_down = False
        await until(lambda: len(queue.handed_over) == 3)
        queue.stop.set()
    scores = [[score.value for score in queue.handed_over[str(number)].scores] for number in range(3)]
    assert scores == [[None] * 4, [1.0, 1.0], [1.0, 1.0]]


async def test_the_poisonous_prompt_alone_does_not_keep_a_breaker_open() -> None:
    """The outage is over and no other group waits: repeating a call that was answered before closes the breaker."""
    setup = ServerScoring(server := Poisoned(), **MINE)
    await setup.scoring.score("p", ["7"], "7", "", {})
    server.is_down = True
    queue = Queue(group(0, BAD))
    async with asyncio.timeout(ANSWER_SECONDS), asyncio.TaskGroup() as tasks:
        tasks.create_task(score_groups(queue, setup.scoring, setup.metrics, queue.stop, Permits(1, max_parked=4)))
        await until(lambda: setup.open("mine:f") == 1)
        server.is_down = False
        await until(lambda: queue.handed_over)
        queue.stop.set()
    assert setup.open("mine:f") == 0


class Stuck(FakeRunner):
    """A server on which, while it is down, `num_killed` calls are killed and all others are never answered."""

    def __init__(self, num_killed: int) -> None:
        super().__init__()
        self.num_killed = num_killed
        self.is_down = False
        self.num_tests = self.num_cancelled = 0

    async def run(
        self, *request: Any, on_outcome: Callable[[Call, Outcome], None], is_test: bool = False
    ) -> list[Outcome]:
        if not self.is_down:
            return await super().run(*request, on_outcome=on_outcome, is_test=is_test)
        if is_test:
            self.num_tests += 1
            on_outcome(request[-1][0], HUNG)
            return [HUNG]
        for call in request[-1][: self.num_killed]:
            on_outcome(call, HUNG)
        try:
            await asyncio.Event().wait()
        finally:
            self.num_cancelled += 1
        raise AssertionError("unreachable")


async def test_a_few_calls_that_were_killed_open_it_while_the_others_of_their_group_still_hang() -> None:
    """Each attempt counts at once: nobody waits for 16 deadlines, one after the other."""
    setup = ServerScoring(server := Stuck(MOST_HANGS), functions={"mine:f": 1.0}, breaker_failures=16)
    await setup.scoring.score("p", ["7"], "7", "", {})
    server.is_down = True
    other = setup.scoring.attempts("q", ["6"] * 8, "7", "", {})
    async with asyncio.timeout(ANSWER_SECONDS), asyncio.TaskGroup() as tasks:
        server.num_killed = 0
        others = tasks.create_task(other.run())
        await asyncio.sleep(0)
        server.num_killed = MOST_HANGS
        attempts = setup.scoring.attempts("p", ["7"] * 8, "7", "", {})
        assert await attempts.run() is None
        assert await others is None, "a group whose calls have not been answered is parked too"
    assert setup.open("mine:f") == 1
    assert server.num_tests == 1
    assert server.num_cancelled == 2
    server.is_down = False
    async with asyncio.timeout(ANSWER_SECONDS):
        for each in (attempts, other):
            await each.breakers_closed()
            verdicts = await each.run()
            assert verdicts is not None
            assert [verdict.score.value for verdict in verdicts] == [1.0] * 8


async def test_a_call_that_is_answered_during_the_test_keeps_it_closed() -> None:
    breaker = Breakers(3, 60, lambda name, is_open: None).of("f")
    breaker.answered(ANSWERED)
    for _ in range(MOST_HANGS):
        breaker.failed("killed", 0, declared=False, hung=True)
    assert breaker.is_suspect
    with breaker.tested():
        assert not breaker.is_suspect, "one test is enough"
        breaker.answered(ANSWERED)
        assert not breaker.has_too_many
