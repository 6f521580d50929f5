"""Calls of rollout services over HTTP, with fake engines: servers that die, are fenced, are updated, or are none."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from penstock.contracts import Sampling, ServiceKind, pack_int32
from penstock.contracts.services import ServiceRecord
from penstock.errors import EngineError
from penstock_agent.generation.call import Call, CallRejectedError, Generated
from penstock_agent.generation.routing import rendezvous
from tests.patience import ANSWER_SECONDS
from tests.unit.agent.generation.servers_setup import FENCED, SERVING, Room, Server, call, calling_room, check
from tests.unit.rollout.weights.updater_setup import MAX_CALLS, until

pytestmark = pytest.mark.slow


@pytest.fixture
async def room(tmp_path: Path) -> AsyncIterator[Room]:
    async with calling_room(tmp_path) as room:
        yield room


def home_of(room: Room, session: str = "0") -> tuple[Server, Server]:
    """The server of a new session, and the other one."""
    first, second = rendezvous(session, [each.name for each in room.rollouts])
    return room.named(first), room.named(second)


async def answer(generating: "asyncio.Task[Generated]") -> Generated:
    async with asyncio.timeout(ANSWER_SECONDS):
        return await generating


async def test_calls_of_a_session_stay_together(room: Room) -> None:
    home, other = home_of(room)
    home.rollout.fake.cached_tokens = 1
    for seed in range(5):
        generated = await room.servers.generate(call(seed=seed))
        check(generated, (1, 4), seed=seed)
        assert (generated.server, generated.num_cached_tokens) == (home.name, 1)
    assert "/generate" not in other.rollout.fake.paths()
    assert room.asked_again == []


async def test_a_call_whose_server_dies_is_answered_by_another(room: Room) -> None:
    home, other = home_of(room)
    home.rollout.fake.holds_at = 2
    generating = asyncio.create_task(room.servers.generate(call()))
    await until(lambda: home.rollout.fake.num_held == 1)
    await home.kill()
    generated = await answer(generating)
    check(generated, (1, 4))
    assert generated.server == other.name
    assert set(room.asked_again) == {"unreachable"}


async def test_a_call_whose_engine_dies_is_answered_by_another(room: Room) -> None:
    home, other = home_of(room)
    home.rollout.fake.holds_at = 2
    generating = asyncio.create_task(room.servers.generate(call()))
    await until(lambda: home.rollout.fake.num_held == 1)
    home.rollout.server.die()
    generated = await answer(generating)
    check(generated, (1, 4))
    assert (generated.server, room.asked_again[0]) == (other.name, "engine_died")


async def loading_again(room: Room, stop: asyncio.Event) -> None:
    """Each engine that was started anew gets its weights, until `stop`: as the producer of its service does."""
    while not stop.is_set():
        for server in room.rollouts:
            if server.rollout.weights.state == "waiting":
                await server.load(1)
        await asyncio.sleep(0.01)


async def test_a_call_that_ends_engines_is_found_out_and_the_others_are_answered(room: Room) -> None:
    stop = asyncio.Event()
    loading = asyncio.create_task(loading_again(room, stop))
    for server in room.rollouts:
        server.rollout.fake.dies_of_seed = 2
    generating = [asyncio.create_task(room.servers.generate(call(seed=seed))) for seed in range(MAX_CALLS)]
    with pytest.raises(CallRejectedError, match="3 engines died with this call"):
        await answer(generating.pop(2))
    for seed, task in zip((0, 1, 3), generating, strict=True):
        check(await answer(task), (1, 4), seed=seed)
    assert sum(server.rollout.server.num_starts - 1 for server in room.rollouts) == 3
    stop.set()
    await loading  # not cancelled: a connection that is cancelled while it is made stays open (anyio 4.14)


async def test_engines_that_end_for_their_weights_blame_no_call(room: Room) -> None:
    home, other = home_of(room)
    other.listed = False
    home.rollout.fake.holds_at = 2
    generating = asyncio.create_task(room.servers.generate(call()))
    for turn in range(3):
        await until(lambda: home.rollout.fake.num_held == turn + 1)  # noqa: B023
        home.rollout.fake.lie_about_version = True
        with pytest.raises(EngineError):
            await home.load(2)
        home.rollout.fake.lie_about_version = False
        await until(home.rollout.engine.up.is_set)
        await home.load(1)
    home.rollout.fake.holds_at = -1
    check(await answer(generating), (1, 4))
    assert room.asked_again.count("failed") == 3
    assert "engine_died" not in room.asked_again


async def test_a_session_leaves_a_server_that_is_fenced_and_comes_to_stay(room: Room) -> None:
    home, other = home_of(room)
    assert (await room.servers.generate(call())).server == home.name
    broken = home.rollout.staged(2)
    (Path(broken.path) / "model.safetensors").write_bytes(b"")
    await asyncio.gather(home.rollout.weights.update(broken), return_exceptions=True)
    assert home.rollout.weights.state == FENCED
    for _ in range(3):
        assert (await room.servers.generate(call())).server == other.name
    assert set(room.asked_again) <= {"busy"}  # at most one call met the fence before the record showed it
    await home.load(3)
    assert (await room.servers.generate(call())).server == other.name


async def test_a_record_that_is_not_up_to_date_hides_no_server(room: Room) -> None:
    for server in room.rollouts:
        server.state = FENCED
    check(await room.servers.generate(call()), (1, 4))


@pytest.mark.parametrize("mode", ["retract", "abort"])
async def test_an_update_in_the_middle_of_a_call_gives_it_two_spans(room: Room, mode: str) -> None:
    home, _ = home_of(room)
    home.rollout.use(pause_mode=mode)
    home.rollout.fake.holds_at = 3
    generating = asyncio.create_task(room.servers.generate(call(num_tokens=8)))
    await until(lambda: home.rollout.fake.num_held == 1)
    updating = asyncio.create_task(home.load(2))
    if mode == "retract":
        await until(lambda: not home.rollout.fake.going_on.is_set())
        home.rollout.fake.holds_at = -1
    await updating
    home.rollout.fake.holds_at = -1
    generated = await answer(generating)
    check(generated, (1, 3), (2, 8))
    assert generated.spans[1].policy == home.rollout.staged(2).identity
    assert room.asked_again == []


async def test_calls_wait_until_a_server_serves_their_weights(room: Room, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "penstock_agent")
    generating = asyncio.create_task(room.servers.generate(call(number=2)))
    await until(lambda: "busy" in room.asked_again)
    await until(lambda: bool(room.servers.waiting_for))
    said = [(each.levelname, each.getMessage()) for each in caplog.records if "calls of the model" in each.getMessage()]
    assert [(level, "wait: rollout-0 (HTTP 503" in text) for level, text in said] == [("INFO", True)]
    assert "1 calls of the model wait: rollout-0 (HTTP 503" in room.servers.waiting_for
    assert "expected version 2" in room.servers.waiting_for
    _, other = home_of(room)
    await other.load(2)
    generated = await answer(generating)
    check(generated, (2, 4))
    assert (generated.server, room.servers.waiting_for) == (other.name, "")


async def test_without_a_server_calls_wait_and_say_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with calling_room(tmp_path, num_servers=1) as room:
        (server,) = room.rollouts
        server.listed = False
        room.others.append(ServiceRecord(ServiceKind.TRAINER, "trainer", "http://127.0.0.1:1", 1, "step"))
        await asyncio.sleep(0)  # the first look
        with caplog.at_level(logging.WARNING, "penstock_agent"):
            generating = [asyncio.create_task(room.servers.generate(call(seed=seed))) for seed in range(3)]
            await until(lambda: "3 calls" in room.servers.waiting_for)
            assert room.servers.waiting_for.endswith("wait: no rollout server is registered")
            server.listed = True
            for seed, task in enumerate(generating):
                check(await answer(task), (1, 4), seed=seed)
        assert len([each for each in caplog.records if "no rollout server" in each.getMessage()]) == 1
        assert room.asked_again == []


async def test_a_call_leaves_a_server_that_is_gone_from_the_queue(room: Room) -> None:
    """Its host is cut off: the connection does not break, and nothing is answered."""
    home, other = home_of(room)
    home.rollout.fake.holds_at = 2
    generating = asyncio.create_task(room.servers.generate(call()))
    await until(lambda: home.rollout.fake.num_held == 1)
    home.listed = False
    generated = await answer(generating)
    check(generated, (1, 4))
    assert (generated.server, room.asked_again) == (other.name, ["gone"])


async def test_more_calls_than_a_server_holds_use_the_others(room: Room) -> None:
    home, other = home_of(room)
    for server in room.rollouts:
        server.rollout.fake.holds_at = 2
    generating = [asyncio.create_task(room.servers.generate(call(seed=seed))) for seed in range(2 * MAX_CALLS)]
    await until(lambda: all(server.rollout.fake.num_held == MAX_CALLS for server in room.rollouts))
    for server in room.rollouts:
        server.rollout.fake.holds_at = -1
    for seed, task in enumerate(generating):
        check(await answer(task), (1, 4), seed=seed)
    assert (await room.servers.generate(call())).server == home.name
    assert other.rollout.fake.max_running == home.rollout.fake.max_running == MAX_CALLS


async def test_a_call_that_no_server_can_answer_is_rejected(room: Room) -> None:
    with pytest.raises(CallRejectedError, match=r"HTTP 422.*expected at most"):
        await room.servers.generate(call(num_tokens=10_000))
    with pytest.raises(CallRejectedError, match="temperature"):
        await room.servers.generate(Call(pack_int32([1]), 0, Sampling(1e300, 4, ()), "0", 1, 1))
    assert room.asked_again == []


async def test_a_call_that_is_given_up_makes_room_in_the_service(room: Room) -> None:
    home, other = home_of(room)
    other.listed = False
    home.rollout.fake.holds_at = 2
    generating = [asyncio.create_task(room.servers.generate(call(seed=seed))) for seed in range(2 * MAX_CALLS)]
    await until(lambda: home.rollout.fake.num_held == MAX_CALLS)
    for task in generating[:MAX_CALLS]:
        task.cancel()
    await until(lambda: home.rollout.sample("groups_total", outcome="returned") == MAX_CALLS)
    home.rollout.fake.holds_at = -1
    for seed, task in list(enumerate(generating))[MAX_CALLS:]:
        check(await answer(task), (1, 4), seed=seed)


async def test_the_trainers_turn_holds_calls_and_loses_none(room: Room) -> None:
    """With `trainer.take_turns`: what runs is cut and goes on, what comes waits; nobody is asked to repeat anything."""
    for server in room.rollouts:
        server.rollout.fake.holds_at = 2
    running = [asyncio.create_task(room.servers.generate(call(session))) for session in "012"]
    await until(lambda: sum(server.rollout.fake.num_held for server in room.rollouts) == 3)
    await asyncio.gather(*(server.rollout.weights.sleep(1) for server in room.rollouts))
    for server in room.rollouts:
        server.rollout.fake.holds_at = -1
    coming = [asyncio.create_task(room.servers.generate(call(session))) for session in "345"]
    await until(lambda: "the trainer's turn" in room.servers.waiting_for)
    await asyncio.gather(*(server.load(2) for server in room.rollouts))
    for task in running:
        check(await answer(task), (1, 2), (2, 4))
    for task in coming:
        check(await answer(task), (2, 4))
    assert [fault for server in room.rollouts for fault in server.rollout.fake.faults] == []
    assert SERVING in {server.rollout.weights.state for server in room.rollouts}
