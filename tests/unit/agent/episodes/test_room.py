"""Which tickets are taken, and how many episodes run."""

import asyncio

from penstock.broker import Stage
from penstock_agent.episodes.room import Room
from tests.patience import ANSWER_SECONDS


async def test_a_group_needs_room_for_all_its_episodes() -> None:
    room = Room(4, 10, 0)
    first = room.enter(Stage.TICKETS, 4)
    assert not room.is_full
    second = room.enter(Stage.TICKETS, 4)
    assert room.is_full
    waiting = asyncio.create_task(room.room())
    first.change(-1)
    await asyncio.sleep(0)
    assert not waiting.done()
    second.change(-1)
    async with asyncio.timeout(ANSWER_SECONDS):
        await waiting
    first.all_ended()
    second.all_ended()
    assert room.enter(Stage.TICKETS, 8).number == 8


async def test_a_group_that_is_larger_than_the_room_runs_alone() -> None:
    room = Room(8, 4, 0)
    assert not room.is_full
    due = room.enter(Stage.TICKETS, 8)
    assert room.is_full
    due.change(-7)
    assert room.is_full
    due.all_ended()
    assert not room.is_full


def test_evaluation_comes_first_up_to_its_share() -> None:
    room = Room(4, 16, 8)
    assert room.order() == (Stage.EVAL, Stage.TICKETS)
    due = [room.enter(Stage.EVAL, 4) for _ in range(2)]
    assert room.order() == (Stage.TICKETS, Stage.EVAL)
    due[0].all_ended()
    assert room.order() == (Stage.EVAL, Stage.TICKETS)
