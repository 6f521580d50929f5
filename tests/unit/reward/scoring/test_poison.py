"""A completion on which a function hangs is not an outage: what opens a breaker, and what does not keep it open."""

import asyncio

import pytest

from penstock_reward.processes.messages import Call, Outcome
from penstock_reward.score_groups import score_groups
from penstock_reward.scoring.permits import Permits
from tests.patience import ANSWER_SECONDS
from tests.unit.reward.scoring.test_breaker import Queue, Server, ServerScoring, until
from tests.unit.reward.scoring.test_scoring import OK, group

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
