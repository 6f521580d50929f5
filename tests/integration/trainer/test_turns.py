"""Trainer and engines take turns on one GPU: never both at once, and the run has the results of one without turns."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.broker import Queue
from penstock.config import Config
from penstock.contracts import PolicyIdentity
from penstock_rollout.weights import turns as turns_module
from tests.integration.trainer.loop_setup import Life
from tests.integration.trainer.turns_setup import NUM_STEPS, TRAINER, World, save_model, sharing_config
from tests.patience import ANSWER_SECONDS

pytestmark = pytest.mark.redis


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "LOOK_SECONDS", 0.05)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("turns")
    save_model(folder)
    return folder


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(ANSWER_SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def finished(life: Life, training: "asyncio.Task[None]") -> list[PolicyIdentity]:
    """Every version, in order, of a run that has ended with all its tickets trained."""
    async with asyncio.timeout(2 * ANSWER_SECONDS):
        await training
    counters = await life.trainer_queue.counters()
    assert (counters.trained, counters.outstanding, dict(counters.dropped)) == (counters.issued, 0, {})
    return [life.versions.known[number] for number in range(NUM_STEPS + 1)]


def world(
    queue: Queue, queue_config: Config, model: Path, folder: Path, *, staleness: int = 0, turns: bool = True
) -> World:
    (folder / "model").symlink_to(model / "model")
    return World(sharing_config(queue_config, folder, take_turns=turns, max_staleness=staleness), queue)


@pytest.fixture
async def expected(queue: Queue, queue_config: Config, model: Path, tmp_path: Path) -> list[PolicyIdentity]:
    """The versions of a run without turns at staleness 0, which are those of every such run."""
    (tmp_path / "calm").mkdir()
    async with world(queue, queue_config, model, tmp_path / "calm", turns=False) as calm:
        await calm.add_server()
        async with calm.trainer() as (life, training):
            versions = await finished(life, training)
    await queue.delete_run()
    await queue.check_server()
    return versions


async def test_they_take_turns_and_the_weights_are_those_without(
    queue: Queue, queue_config: Config, model: Path, tmp_path: Path, expected: list[PolicyIdentity]
) -> None:
    async with world(queue, queue_config, model, tmp_path) as run:
        for _ in range(2):
            await run.add_server()
        async with run.trainer() as (life, training):
            assert await finished(life, training) == expected
            lines = list(life.status.progress.steps_after(-1))
            sample = life.metrics.registry.get_sample_value
            turns = {
                holder: sample("penstock_trainer_turn_seconds_total", {"phase": holder})
                for holder in ("engines", "to_trainer", "trainer", "to_engines")
            }
            assert life.status.shown().turn == "engines"
        run.check()
        trainers = [each for each in run.gpu.events if each.startswith(TRAINER)]
        assert trainers == [f"{TRAINER} takes", f"{TRAINER} leaves"] * (NUM_STEPS + 1)  # one for the first version
        assert all((seconds or 0) > 0 for seconds in turns.values()), turns
        assert all({"take_turn", "leave"} <= line["seconds"].keys() for line in lines)
        assert [each.engine.life for each in run.servers] == [1, 1]
        assert all(each.weights.identity == expected[-1] for each in run.servers)


async def test_at_staleness_1_each_turn_interrupts_and_no_token_is_too_old(
    queue: Queue, queue_config: Config, model: Path, tmp_path: Path
) -> None:
    async with world(queue, queue_config, model, tmp_path, staleness=1) as run:
        server = await run.add_server()
        server.fake.token_seconds = 0.02
        await until(server.engine.up.is_set)
        async with run.trainer() as (life, training):
            await finished(life, training)
            staleness = [line["staleness_max"] for line in life.status.progress.steps_after(-1)]
        run.check()
        assert max(staleness) <= 1
        assert server.weights.num_interruptions == NUM_STEPS + 1


async def test_a_trainer_that_dies_in_its_turn_leaves_the_gpu_to_the_engines_and_the_next_takes_it_again(
    queue: Queue, queue_config: Config, model: Path, tmp_path: Path, expected: list[PolicyIdentity]
) -> None:
    async with world(queue, queue_config, model, tmp_path) as run:
        server = await run.add_server()
        async with run.trainer() as (life, _):
            await life.announced(1)
            life.transport.hold()
            await life.watch.until("finished", 2)
            assert run.gpu.users == {TRAINER}
            assert server.weights.asleep
        await until(lambda: server.weights.identity == expected[1])  # the announced version
        assert run.gpu.users == {server.name}
        assert server.engine.life == 1
        async with run.trainer() as (life, training):
            assert await finished(life, training) == expected
        run.check()


async def test_a_server_that_dies_in_the_trainers_turn_comes_back_after_it(
    queue: Queue, queue_config: Config, model: Path, tmp_path: Path, expected: list[PolicyIdentity]
) -> None:
    async with world(queue, queue_config, model, tmp_path) as run:
        first, second = await run.add_server(), await run.add_server()
        async with run.trainer() as (life, training):
            await life.announced(1)
            life.transport.hold()
            await life.watch.until("finished", 2)
            await first.kill()
            second.server.die()  # the engine alone
            third = await run.add_server()
            gates = [each.gate for each in (second, third) if each.gate]
            await until(lambda: all(gate.is_closed for gate in gates))
            assert run.gpu.users == {TRAINER}
            life.transport.let_go()
            assert await finished(life, training) == expected
        run.check()
        await until(lambda: all(each.weights.identity == expected[-1] for each in (second, third)))
        assert (second.engine.life, third.engine.life) == (2, 1)


async def test_an_engine_that_does_not_give_up_its_memory_is_killed_before_the_trainer_takes_it(
    queue: Queue, queue_config: Config, model: Path, tmp_path: Path, expected: list[PolicyIdentity]
) -> None:
    (tmp_path / "model").symlink_to(model / "model")
    config = sharing_config(queue_config, tmp_path, take_turns=True, max_staleness=0, push_timeout_seconds=3.0)
    async with World(config, queue) as run:
        server = await run.add_server()
        async with run.trainer() as (life, training):
            await life.announced(1)
            server.fake.may_give_up.clear()
            await life.watch.until("turn", 3)
            server.fake.may_give_up.set()
            assert await finished(life, training) == expected
        run.check()
        assert server.engine.life >= 2
        assert f"{server.name} leaves" in run.gpu.events


async def test_a_trainer_waits_for_an_engine_that_has_begun_to_start(
    queue: Queue, queue_config: Config, model: Path, tmp_path: Path
) -> None:
    async with world(queue, queue_config, model, tmp_path) as run:
        server = await run.add_server(may_start=False)
        await until(lambda: server.server.num_starts == 1)
        async with run.trainer() as (life, training):
            await until(lambda: life.status.turn == "to_trainer")
            await asyncio.sleep(0.3)  # it asks, and is answered: not yet
            assert run.gpu.users == {server.name}
            server.fake.may_start.set()
            await life.announced(0)
            life.requests.stop.set()
            async with asyncio.timeout(ANSWER_SECONDS):
                await training
        run.check()
        assert run.gpu.events[:3] == [f"{server.name} takes", f"{server.name} leaves", f"{TRAINER} takes"]
        assert server.engine.life == 1


async def test_a_step_that_changes_nothing_wakes_the_engines_too(
    queue: Queue, queue_config: Config, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No version is new, and the engines have lost the one that they had."""
    async with world(queue, queue_config, model, tmp_path) as run:
        await run.add_server()
        run.same_rewards = True
        async with run.trainer() as (life, training):
            async with asyncio.timeout(2 * ANSWER_SECONDS):
                await training
            assert {line["version"] for line in life.status.progress.steps_after(-1)} == {0}
        run.check()
        assert run.servers[0].weights.state == "serving"
    assert "without a push" not in caplog.text  # with which a server wakes by itself
