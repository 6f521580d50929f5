"""Who gets room, and in which order."""

import asyncio
import random

import pytest

from penstock.errors import EngineBusyError
from penstock_rollout.admission import Admission
from tests.patience import ANSWER_SECONDS


class Crowd:
    """Calls that hold their room until they are let go."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.began: list[int] = []
        self.ends: dict[int, asyncio.Event] = {}
        self.sizes: dict[int, int] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}

    async def call(self, number: int, size: int = 1) -> None:
        self.ends[number], self.sizes[number] = asyncio.Event(), size
        self.tasks[number] = asyncio.create_task(self._hold(number, size))
        await asyncio.sleep(0)

    async def _hold(self, number: int, size: int) -> None:
        async with self.admission.room(size):
            self.began.append(number)
            try:
                await self.ends[number].wait()
            finally:
                self.sizes[number] = 0

    async def end(self, number: int) -> None:
        self.ends[number].set()
        await self.tasks[number]
        await asyncio.sleep(0)

    @property
    def num_running(self) -> int:
        return sum(self.sizes[number] for number in self.began)


async def test_who_came_first_runs_first() -> None:
    crowd = Crowd(Admission(max_running=2, max_waiting=8))
    for number in range(6):
        await crowd.call(number)
    assert (crowd.began, crowd.admission.num_waiting) == ([0, 1], 4)
    for number in range(6):
        await crowd.end(number)
    assert crowd.began == list(range(6))


async def test_a_large_call_is_not_overtaken_by_small_ones() -> None:
    crowd = Crowd(Admission(max_running=3, max_waiting=8))
    await crowd.call(0, 2)
    await crowd.call(1, 3)
    await crowd.call(2, 1)  # would fit, and waits behind
    assert crowd.began == [0]
    await crowd.end(0)
    assert crowd.began == [0, 1]
    await crowd.end(1)
    assert crowd.began == [0, 1, 2]


async def test_a_call_that_is_larger_than_all_room_runs_alone() -> None:
    crowd = Crowd(Admission(max_running=2, max_waiting=8))
    await crowd.call(0)
    await crowd.call(1, 5)
    assert crowd.began == [0]
    await crowd.end(0)
    assert crowd.began == [0, 1]


async def test_beyond_those_that_may_wait_a_call_is_refused() -> None:
    crowd = Crowd(Admission(max_running=1, max_waiting=1))
    for number in range(3):
        await crowd.call(number)
    with pytest.raises(EngineBusyError, match="1 completions run here and 1 calls wait; expected at most 1"):
        await crowd.tasks[2]
    await crowd.end(0)
    assert crowd.began == [0, 1]


async def test_closing_refuses_those_that_wait_and_leaves_those_that_run() -> None:
    crowd = Crowd(Admission(max_running=1, max_waiting=2))
    await crowd.call(0)
    await crowd.call(1)
    crowd.admission.close("it stops")
    await crowd.call(2)
    for number in (1, 2):
        with pytest.raises(EngineBusyError, match="it stops"):
            await crowd.tasks[number]
    await crowd.end(0)
    assert crowd.began == [0]


async def test_room_is_neither_lost_nor_given_twice_whoever_gives_up() -> None:
    """Cancelled at any moment: while they wait, when they have just got room, while they run."""
    for seed in range(60):
        rng = random.Random(seed)
        crowd = Crowd(Admission(max_running=3, max_waiting=100))
        for number in range(30):
            await crowd.call(number, rng.randint(1, 3))
            if rng.random() < 0.5:
                crowd.ends[rng.randrange(number + 1)].set()
            if rng.random() < 0.5:
                crowd.tasks[rng.randrange(number + 1)].cancel()
            assert crowd.num_running <= 3
        for end in crowd.ends.values():
            end.set()
        async with asyncio.timeout(ANSWER_SECONDS):
            await asyncio.gather(*crowd.tasks.values(), return_exceptions=True)
        assert (crowd.admission.num_waiting, crowd.num_running) == (0, 0)
        await crowd.call(100, 3)
        assert crowd.began[-1] == 100
        crowd.tasks[100].cancel()
