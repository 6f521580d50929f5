"""Runs that recover by themselves: a slow link, a restarted queue, a broken reward; and a run that ends in order."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from penstock.broker import Queue, Stage, Worker, connect
from penstock.broker.embedded import EmbeddedServer
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from tests.integration.broker.queue_setup import make_group, make_scored, make_ticket, written
from tests.integration.launch.user_commands import (
    SPREAD,
    UserCommands,
    assert_one_line,
    ended,
    eventually,
    read_only,
    trained,
)
from tests.patience import ANSWER_SECONDS, START_SECONDS
from tests.unit.rollout.test_fake_engine import FakeSGLang, serving

pytestmark = pytest.mark.redis

STALL_EXIT = 3
OUT_OF_ORDER = "def broken(prompt, completion, answer, metadata):\n    raise ConnectionError('judge is down')\n"


class Link:
    """A TCP connection to the queue that is slow, or carries nothing while `open` is clear."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.delay_seconds = 0.0
        self.open = asyncio.Event()
        self.open.set()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                await asyncio.sleep(self.delay_seconds)
                await self.open.wait()
                writer.write(data)
                await writer.drain()
        writer.close()


async def test_a_link_that_is_slow_and_stalls_delays_work_and_repeats_none(
    redis_server: EmbeddedServer, queue_config: Config
) -> None:
    link = Link(redis_server.port)
    async with link.serving() as port:
        section = queue_config.redis.model_copy(update={"url": f"redis://127.0.0.1:{port}/0"})
        config = queue_config.model_copy(update={"redis": section})
        queue = await connect(config)
        try:
            trainer = TrainerQueue(queue, await acquire_lease(queue, config))
            await trainer.issue([make_ticket(0)])
            worker = Worker(queue, "worker", config.staleness)
            delivery = await worker.take(Stage.TICKETS)
            assert delivery is not None
            link.delay_seconds = 0.05
            link.open.clear()
            moving = asyncio.create_task(worker.hand_over(delivery, make_group(make_ticket(0)), Stage.ROLLOUTS))
            await asyncio.sleep(0.5)
            assert not moving.done()
            link.open.set()
            async with asyncio.timeout(ANSWER_SECONDS):
                assert await moving is True
            assert (await queue.depths())["rollouts"] == 1
            assert (await queue.depths())["tickets"] == 0
            await queue.delete_run()
        finally:
            await queue.close()


async def test_a_restart_of_the_queue_keeps_what_is_held_at_every_stage(tmp_path: Path, queue_config: Config) -> None:
    with EmbeddedServer(tmp_path / "queue") as server:
        config = queue_config.model_copy(update={"redis": server.section(queue_config.redis)})
        queue = await connect(config)
        try:
            trainer = TrainerQueue(queue, await acquire_lease(queue, config))
            await trainer.issue([make_ticket(number) for number in range(2)])
            rollout, reward = (Worker(queue, name, config.staleness) for name in ("rollout", "reward"))
            first, second = [await rollout.take(Stage.TICKETS) for _ in range(2)]
            assert first is not None
            assert second is not None
            await rollout.hand_over(first, make_group(make_ticket(0)), Stage.ROLLOUTS)
            scored = await reward.take(Stage.ROLLOUTS)
            assert scored is not None
            await written(queue)
            server.kill()
            moving = [
                asyncio.create_task(rollout.hand_over(second, make_group(make_ticket(1)), Stage.ROLLOUTS)),
                asyncio.create_task(reward.hand_over(scored, make_scored(make_ticket(0)), Stage.SCORED)),
            ]
            await asyncio.sleep(0)
            server.start()
            async with asyncio.timeout(ANSWER_SECONDS):
                assert await asyncio.gather(*moving) == [True, True]
            depths = await queue.depths()
            assert (depths["tickets"], depths["rollouts"], depths["scored"]) == (0, 1, 1)
            assert len(await trainer.live()) == 2
        finally:
            await queue.close()


@pytest.mark.slow
async def test_sigterm_writes_a_checkpoint_and_the_same_command_goes_on(
    setup: UserCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.unit.rollout.fake_model.VOCABULARY", 43)  # the tiny model's
    setup.document["total_train_epochs"] = 12
    setup.score_by("spread", SPREAD)
    async with serving(FakeSGLang()) as url:
        setup.start_services(url)
        first = setup.start("penstock_trainer")
        queue = await connect(Config.model_validate(setup.document))
        try:
            trainer = read_only(queue)
            await eventually(lambda: trained(queue), 1, first)
            first.send_signal(signal.SIGTERM)
            assert await ended(first) == 0
            left = await trainer.ledger()
            assert left.steps
            assert left.checkpoints[-1].steps == len(left.steps) < 12
            again = setup.start("penstock_trainer")
            assert await ended(again) == 0, again.stdout and again.stdout.read()
            after = await trainer.ledger()
            assert after.steps[: len(left.steps)] == left.steps
            tickets = [number for record in after.steps for number in record.tickets]
            assert sorted([*tickets, *after.dropped]) == list(range(24))
            assert [record.step for record in after.steps] == list(range(len(after.steps)))
            assert (await trainer.counters()).outstanding == 0
        finally:
            await queue.close()


async def are_up(queue: Queue) -> bool:
    """Whether the reward service, the rollout service and its engine are ready."""
    services = await queue.services()
    return len(services) == 2 and all(each.state != "starting" for each in services)


@pytest.mark.slow
async def test_a_reward_that_stays_out_of_order_ends_the_run_with_its_breaker_named(setup: UserCommands) -> None:
    setup.score_by("broken", OUT_OF_ORDER)
    setup.document["run"]["stall_seconds"] = 8  # enough for the other services, which are up, to meet the failure
    setup.document["reward"] |= {"breaker_failures": 1, "breaker_seconds": 0.1, "max_attempts": 1}
    async with serving(FakeSGLang()) as url:
        setup.start_services(url)
        queue = await connect(Config.model_validate(setup.document))
        try:
            async with asyncio.timeout(START_SECONDS):
                while not await are_up(queue):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            trainer = setup.start("penstock_trainer")
            code = await ended(trainer)
            assert trainer.stdout is not None
            expected = ("no progress", "holds from rollouts", "breaker open: own:broken (", "judge is down")
            assert_one_line((code, trainer.stdout.read()), STALL_EXIT, *expected)
            counters = await read_only(queue).counters()
            assert counters.outstanding == counters.issued > 0
        finally:
            await queue.close()
