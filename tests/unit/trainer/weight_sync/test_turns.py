"""The trainer's side of a turn: who is asked, how long the trainer waits, and the order of it all."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import httpx
import pytest

from penstock.broker.trainer import TrainerQueue
from penstock.contracts import ServiceKind
from penstock.contracts.services import ServiceRecord, Turn
from penstock.errors import LeaseLostError, WeightsError
from penstock_trainer.weight_sync import turns as turns_module
from penstock_trainer.weight_sync.rollout_client import RolloutClient
from penstock_trainer.weight_sync.turns import Holder, Turns
from tests.patience import ANSWER_SECONDS

Answers = list[bool | Exception]


def record(name: str, kind: ServiceKind = ServiceKind.ROLLOUT, state: str = "serving") -> ServiceRecord:
    return ServiceRecord(kind, name, f"http://{name}", 1, state)


@dataclass
class World:
    """Queue, servers and models at once, in the order of what was asked of them."""

    answers: dict[str, Answers]
    events: list[str] = field(default_factory=list)
    records: list[ServiceRecord] = field(default_factory=list)
    computing: int = 0
    shown: list[tuple[Holder, Holder]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.records = [*map(record, self.answers), record("trainer-7", ServiceKind.TRAINER, "training")]
        self.queue = self

    async def take_turn(self, number: int) -> Turn:
        self.events.append(f"turn {number}")
        return Turn(7, number)

    async def end_turn(self) -> None:
        self.events.append("end")

    async def services(self) -> list[ServiceRecord]:
        return list(self.records)

    async def sleep(self, url: str, turn: Turn) -> bool:
        name = url.removeprefix("http://")
        self.events.append(f"ask {name} {turn}")
        answer = self.answers[name].pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def to_device(self) -> None:
        assert self.computing
        self.events.append("to device")

    def to_host(self) -> None:
        assert self.computing
        self.events.append("to host")

    @contextlib.contextmanager
    def compute(self) -> Iterator[None]:
        self.computing += 1
        yield
        self.computing -= 1

    def show(self, before: Holder, seconds: float, now: Holder) -> None:
        assert 0 <= seconds <= time.monotonic()
        self.shown.append((before, now))

    @property
    def turns(self) -> Turns:
        queue, client = cast(TrainerQueue, self), cast(RolloutClient, self)
        return Turns(queue, client, self, computing=self.compute, show=self.show)


@pytest.fixture(autouse=True)
def _asks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "RETRY_SECONDS", 0.01)


async def test_a_turn_from_its_start_to_its_end() -> None:
    world = World({"a": [True, True], "b": [True, True]})
    turns = world.turns
    for number in (1, 2):
        await turns.take()
        await turns.leave()
        await turns.end()
        asked = [f"turn {number}", f"ask a 7.{number}", f"ask b 7.{number}"]
        assert world.events == [
            *asked,
            f"turn {number}",
            "to device",
            "to host",
            "end",
        ]  # it looks for others once more
        world.events.clear()
    way: list[Holder] = ["engines", "to_trainer", "trainer", "to_engines"]
    assert world.shown == list(zip(way, [*way[1:], "engines"], strict=True)) * 2


async def test_the_models_move_when_the_last_server_sleeps_and_nobody_is_asked_twice() -> None:
    world = World({"a": [True], "b": [False, WeightsError("HTTP 500"), httpx.ReadTimeout("late"), True]})
    await world.turns.take()
    assert [each for each in world.events if each.startswith("ask a")] == ["ask a 7.1"]
    assert world.events[-3:] == ["ask b 7.1", "turn 1", "to device"]
    assert world.events.count("turn 1") == 5  # written again: the queue may have lost it


async def test_a_server_that_has_died_is_waited_for_until_its_record_expires(caplog: pytest.LogCaptureFixture) -> None:
    world = World({"a": [httpx.ConnectError("refused")] * 1000})
    taking = asyncio.create_task(world.turns.take())
    async with asyncio.timeout(ANSWER_SECONDS):
        while world.events.count("ask a 7.1") < 5:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert "to device" not in world.events
    world.records = []
    await taking
    assert world.events[-1] == "to device"
    assert len([each for each in caplog.messages if "does not leave the GPU" in each]) == 1


async def test_a_server_that_joins_meanwhile_is_asked_too() -> None:
    world = World({"a": [False, True]})
    sleep = world.sleep

    async def join(url: str, turn: Turn) -> bool:
        if "b" not in world.answers:
            world.answers["b"] = [False, True]
            world.records.append(record("b", state="starting"))
        return await sleep(url, turn)

    world.sleep = cast(Any, join)  # type: ignore[method-assign]
    await world.turns.take()
    assert world.events.count("ask b 7.1") == 2
    assert world.events[-1] == "to device"


async def test_a_trainer_that_lost_its_lease_asks_nobody() -> None:
    world = World({"a": [True]})

    async def refused(number: int) -> Turn:
        raise LeaseLostError("the lease is held by 8:x")

    world.take_turn = cast(Any, refused)  # type: ignore[method-assign]
    with pytest.raises(LeaseLostError):
        await world.turns.take()
    assert world.events == []
