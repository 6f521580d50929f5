"""Whose turn it is on the GPU, as a rollout service follows it: requests, the queue, and starts that must wait."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from penstock.config import EngineSection, WeightsSection
from penstock.contracts import to_body
from penstock.contracts.services import Announcement, Turn
from penstock.errors import WeightsBusyError
from penstock_rollout.engine.engine import Engine
from penstock_rollout.engine.sglang.client import SGLangClient
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.weights import turns as turns_module
from penstock_rollout.weights.turns import TurnGate, Turns
from penstock_rollout.weights.updater import WeightUpdater
from tests.patience import ANSWER_SECONDS
from tests.unit.rollout.test_fake_engine import FakeServer, FakeSGLang, serving
from tests.unit.rollout.weights.updater_setup import Rollout, until

FIRST, SECOND = Turn(1, 1), Turn(1, 2)


@dataclass
class Board:
    """The queue: whose turn it is, what is announced, and what was done in which order."""

    turn: Turn | None = None
    announced: Announcement | None = None
    events: list[str] = field(default_factory=list)
    may_read: asyncio.Event = field(default_factory=asyncio.Event)
    may_load: asyncio.Event = field(default_factory=asyncio.Event)
    num_reads: int = 0
    num_loading: int = 0
    num_loaded: int = 0

    async def read(self) -> Turn | None:
        self.num_reads += 1
        self.events.append("read")
        turn = self.turn
        await self.may_read.wait()  # the answer is on its way
        return turn

    async def register(self) -> None:
        self.events.append("register")


@dataclass
class World(Rollout):
    """A rollout service that shares its GPU."""

    board: Board
    gate: TurnGate
    turns: Turns


@contextlib.asynccontextmanager
async def sharing_rollout(root: Path, board: Board) -> AsyncIterator[World]:
    fake = FakeSGLang()
    async with serving(fake) as url:
        server = FakeServer(fake, url)
        gate = TurnGate(board.read, board.register)
        engine = Engine(server, SGLangClient(EngineSection(request_timeout_seconds=ANSWER_SECONDS)), gate=gate)
        metrics = RolloutMetrics()
        weights = WeightUpdater(engine, WeightsSection(), metrics)

        async def load_announced() -> None:
            if board.announced is not None:
                board.num_loading += 1
                await board.may_load.wait()  # its files are looked for
                await weights.update(board.announced)
                board.num_loaded += 1

        turns = Turns(board.read, gate, engine, weights, load_announced)
        stop = asyncio.Event()
        tasks = [asyncio.create_task(each) for each in (engine.keep_engine(stop, weights.forget), turns.watch())]
        try:
            yield World(fake, server, engine, weights, metrics, root, board, gate, turns)
        finally:
            board.may_read.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await engine.close()
        assert fake.faults == []


@pytest.fixture
async def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    monkeypatch.setattr(turns_module, "LOOK_SECONDS", 0.02)
    board = Board()
    board.may_read.set()
    board.may_load.set()
    return board


@pytest.fixture
async def world(board: Board, tmp_path: Path) -> AsyncIterator[World]:
    async with sharing_rollout(tmp_path, board) as world:
        await world.engine.up.wait()
        await world.weights.update(world.watched(1))
        yield world


@pytest.fixture
async def http(world: World) -> AsyncIterator[httpx.AsyncClient]:
    app = world.app(SecretStr("secret"), world.turns)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://rollout", headers={"Authorization": "Bearer secret"}
    ) as client:
        yield client


async def asked(http: httpx.AsyncClient) -> httpx.Response:
    """The answer to the trainer's request for its first turn, once it is another than: not yet."""
    async with asyncio.timeout(ANSWER_SECONDS):
        while (answer := await http.post("/v1/sleep", json=to_body(FIRST))).status_code == 503:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return answer


async def test_asked_it_answers_once_it_uses_no_memory(world: World, http: httpx.AsyncClient) -> None:
    world.board.turn = FIRST
    for _ in range(2):
        answer = await asked(http)
        assert (answer.status_code, answer.json()["state"]) == (200, "asleep")
        assert world.fake.given_up
    ready = await http.get("/ready")
    assert ready.status_code == 503
    assert "trainer.take_turns" in ready.json()["detail"]
    generated = await http.post("/v1/generate", json={"prompt_ids": [1]})
    assert generated.status_code == 503


async def test_it_sleeps_for_nobody_whose_turn_it_is_not(world: World, http: httpx.AsyncClient) -> None:
    for turn in (None, Turn(2, 1)):  # a trainer that lost its lease asks
        world.board.turn = turn
        answer = await http.post("/v1/sleep", json=to_body(FIRST))
        assert (answer.status_code, answer.json()["error"]) == (409, "weights_conflict")
        assert turn is not None or world.weights.state == "serving"
    assert (await http.post("/v1/sleep", json=to_body(FIRST), headers={"Authorization": ""})).status_code == 401
    assert (await http.post("/v1/sleep", json={"lease": -1})).status_code == 422


async def test_a_service_without_turns_refuses_to_sleep(world: World) -> None:
    app = world.app()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://rollout") as client:
        answer = await client.post("/v1/sleep", json=to_body(FIRST))
    assert answer.status_code == 409
    assert "trainer.take_turns" in answer.json()["detail"]


async def test_it_sleeps_though_nobody_asked_it_and_once_a_turn(world: World) -> None:
    world.board.turn = FIRST
    await until(lambda: world.weights.asleep)
    await world.weights.update(world.watched(2))  # the trainer has left the GPU, and pushes
    reads = world.board.num_reads
    await until(lambda: world.board.num_reads > reads + 3)
    assert world.weights.state == "serving"
    world.board.turn = SECOND
    await until(lambda: world.weights.asleep)


async def test_a_turn_that_ends_without_a_push_wakes_it_with_the_announced_weights(world: World) -> None:
    """Its trainer has died, or did not reach it."""
    world.board.turn = FIRST
    world.board.announced = world.watched(1)
    await until(lambda: world.weights.asleep)
    world.board.turn = None
    await until(lambda: world.weights.state == "serving")
    assert world.weights.identity == world.board.announced.identity
    assert world.engine.life == 1
    world.board.turn = FIRST  # the lease had expired, and is held again: it is still that trainer's turn
    await until(lambda: world.weights.asleep)


async def test_it_sleeps_for_a_turn_that_begins_while_it_wakes(world: World) -> None:
    """It had read that it is the engines' turn; a confirmation before it has woken would be void at once."""
    world.board.turn = FIRST
    world.board.announced = world.watched(1)
    await until(lambda: world.weights.asleep)
    world.board.may_load.clear()
    world.board.turn = None
    await until(lambda: world.board.num_loading == 1)
    world.board.turn = SECOND
    asking = asyncio.create_task(world.turns.sleep(SECOND))
    await asyncio.sleep(0)
    world.board.may_load.set()
    await asking
    await until(lambda: world.board.num_loaded == 1)
    assert world.weights.asleep


async def test_nothing_wakes_it_before_anything_is_announced(world: World) -> None:
    world.board.turn = FIRST
    await until(lambda: world.weights.asleep)
    world.board.turn = None
    reads = world.board.num_reads
    await until(lambda: world.board.num_reads > reads + 3)
    assert world.weights.asleep
    world.board.announced = world.watched(2)
    await until(lambda: world.weights.state == "serving")


async def test_no_engine_starts_in_the_trainers_turn(board: Board, tmp_path: Path) -> None:
    board.turn = FIRST
    async with sharing_rollout(tmp_path, board) as world:
        await until(lambda: board.num_reads > 6)
        assert world.server.num_starts == 0
        assert (world.weights.state, world.engine.up.is_set()) == ("asleep", False)
        board.turn = None
        await until(lambda: world.engine.up.is_set())
        assert world.weights.state == "waiting"


async def test_a_service_shows_itself_before_it_reads_whose_turn_it_is(board: Board) -> None:
    """The trainer takes its turn before it reads the services: one of both is in time."""
    await TurnGate(board.read, board.register).passed()
    assert board.events == ["register", "read"]


async def test_an_engine_that_dies_in_the_trainers_turn_is_started_after_it(world: World) -> None:
    world.board.turn = FIRST
    await until(lambda: world.weights.asleep)
    world.server.die()
    await until(lambda: world.gate.is_closed)
    assert (world.server.num_starts, world.weights.state) == (1, "asleep")
    world.board.turn = None
    await until(lambda: world.server.num_starts == 2)
    await until(lambda: world.weights.state == "waiting")
    assert not world.weights.asleep


async def test_an_engine_that_does_not_give_up_its_memory_is_gone_before_the_service_sleeps(
    world: World, http: httpx.AsyncClient
) -> None:
    world.use(push_timeout_seconds=0.3)
    world.fake.may_give_up.clear()
    has_memory = [True]
    world.fake.on_memory = has_memory.append
    world.board.turn = FIRST
    assert (await asked(http)).status_code == 200
    assert has_memory[-1] is False
    assert world.server.num_starts == 1


async def test_a_start_that_has_passed_the_gate_is_no_sleep(board: Board, tmp_path: Path) -> None:
    """The gate has read that it is the engines' turn; then the trainer takes its turn, and asks."""
    board.may_read.clear()
    async with sharing_rollout(tmp_path, board) as world:
        await until(lambda: board.num_reads == 2)  # by the gate and by the watch: the answers are on their way
        world.fake.may_start.clear()
        board.turn = FIRST
        asking = asyncio.create_task(world.turns.sleep(FIRST))
        board.may_read.set()
        with pytest.raises(WeightsBusyError):
            await asking
        assert not world.gate.is_closed
        world.fake.may_start.set()
        await until(lambda: world.weights.asleep)  # once it is up
        assert world.server.num_starts == 1


async def test_a_gate_that_reads_again_is_no_sleep(board: Board, tmp_path: Path) -> None:
    """Between two reads of the gate it may be open."""
    board.turn = FIRST
    async with sharing_rollout(tmp_path, board) as world:
        await until(lambda: world.gate.is_closed)
        assert world.gate.closed_for == FIRST
        board.may_read.clear()
        await until(lambda: not world.gate.is_closed)
        board.may_read.set()
        board.turn = None
        await until(lambda: world.server.num_starts == 1)
