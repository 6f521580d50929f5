"""The server behind the queue: full, too small, frozen, unreachable, shared by runs, and calls that are cancelled."""

import asyncio
import signal
from pathlib import Path

import pytest
from redis.exceptions import ResponseError

from penstock.broker import Queue, Stage, check_memory, connect, memory_use
from penstock.broker.embedded import EmbeddedServer
from penstock.broker.keys import GROUP
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config, RedisSection
from penstock.errors import ConfigError, QueueError
from tests.integration.broker.queue_setup import issue, make_group, make_ticket, make_worker
from tests.patience import ANSWER_SECONDS
from tests.small_disk import fill, make_room, small_disk


async def test_two_runs_do_not_meet(trainer: TrainerQueue, queue: Queue, queue_config: Config) -> None:
    await issue(trainer, 0)
    other_config = queue_config.model_copy(update={"run": queue_config.run.model_copy(update={"name": "other"})})

    other = await connect(other_config)
    try:
        assert (await other.depths())["tickets"] == 0
        assert await other.delete_run() > 0
        assert (await queue.depths())["tickets"] == 1
    finally:
        await other.close()


async def test_a_full_redis_stops_work_and_loses_nothing(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await issue(trainer, 0, 1)
    worker = make_worker(queue, queue_config)
    delivery = await worker.take(Stage.TICKETS)
    assert delivery is not None
    await queue.client.config_set("maxmemory", "1mb")
    try:
        group = make_group(make_ticket(0))
        moving = asyncio.create_task(worker.hand_over_and_take(delivery, group, Stage.ROLLOUTS, Stage.TICKETS))
        await asyncio.sleep(0.5)
        assert not moving.done()
        assert (await queue.depths())["rollouts"] == 0
        waiting = await queue.client.xpending(queue.keys.stream(Stage.TICKETS), GROUP)
        assert waiting["pending"] == 1, "the second was taken by a hand-over that was refused"
    finally:
        await queue.client.config_set("maxmemory", "0")
    async with asyncio.timeout(ANSWER_SECONDS):
        moved, following = await moving
    assert moved
    assert following is not None


async def test_a_full_disk_of_the_queue_stops_work_and_loses_nothing(
    tmp_path: Path, queue_config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    """The server refuses every change while it cannot write its file."""
    with small_disk(tmp_path / "disk") as disk, EmbeddedServer(disk / "queue", log_path=tmp_path / "log") as server:
        staleness = queue_config.staleness.model_copy(update={"heartbeat_seconds": 15})  # the lease is renewed each 5 s
        redis = server.section(queue_config.redis)
        config = queue_config.model_copy(update={"redis": redis, "staleness": staleness})
        queue = await connect(config)
        try:
            lease = await acquire_lease(queue, config)
            lost: list[Exception] = []
            lease.start_renewing(lost.append)
            trainer = TrainerQueue(queue, lease)
            await issue(trainer, 0)
            fill(disk)
            async with asyncio.timeout(ANSWER_SECONDS):
                while not await refuses(queue):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            issuing = asyncio.create_task(issue(trainer, 1))
            async with asyncio.timeout(ANSWER_SECONDS):
                while "not be renewed yet: MISCONF" not in caplog.text and not issuing.done():  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert not issuing.done()
            assert "waiting; make room on its disk" in caplog.text
            make_room(disk)
            async with asyncio.timeout(ANSWER_SECONDS):
                await issuing
            assert lost == []
            assert (await queue.depths())["tickets"] == 2
            await asyncio.to_thread(lease.release)
        finally:
            await queue.close()


async def refuses(queue: Queue) -> bool:
    """Whether the server has found out that its disk is full; it does not at the first change after that."""
    try:
        await queue.client.set("noise", b"x" * 4096)
    except ResponseError as error:
        return str(error).startswith("MISCONF")
    return False


async def test_a_queue_that_is_too_small_is_refused(queue: Queue) -> None:
    await queue.client.config_set("maxmemory", "100mb")
    try:
        await check_memory(queue, 50 * 2**20)
        with pytest.raises(ConfigError, match="maxmemory"):
            await check_memory(queue, 200 * 2**20)
        use = await memory_use(queue)
        assert 0 < use.used_bytes < use.limit_bytes == 100 * 2**20
    finally:
        await queue.client.config_set("maxmemory", "0")
    assert (await memory_use(queue)).limit_bytes > 100 * 2**20  # its host's memory


async def test_an_unreachable_redis_is_named(queue_config: Config) -> None:

    gone = queue_config.model_copy(
        update={"redis": queue_config.redis.model_copy(update={"url": "redis://127.0.0.1:1/0", "timeout_seconds": 0.5})}
    )
    with pytest.raises(QueueError, match=r"redis\.url redis://127\.0\.0\.1:1/0"):
        async with asyncio.timeout(ANSWER_SECONDS):
            await connect(gone)


async def test_a_wrong_password_is_named_at_once(queue_config: Config) -> None:
    section = type(queue_config.redis).model_validate(
        {"url": queue_config.redis.url, "password": "wrong", "timeout_seconds": 600}
    )
    with pytest.raises(ConfigError, match=r"redis\.password"):
        async with asyncio.timeout(ANSWER_SECONDS):
            await connect(queue_config.model_copy(update={"redis": section}))


async def test_an_old_server_that_repeats_the_password_does_not_get_it_shown(queue_config: Config) -> None:
    """Redis 5 has no HELLO, and its refusal repeats the arguments."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while header := await reader.readline():
            arguments = []
            for _ in range(int(header[1:])):
                size = int((await reader.readline())[1:])
                arguments.append((await reader.readexactly(size + 2))[:size])
            name, *rest = (b"`%s`" % each for each in arguments)
            writer.write(b"-ERR unknown command %s, with args beginning with: %s\r\n" % (name, b" ".join(rest)))
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        section = RedisSection.model_validate({"url": f"redis://127.0.0.1:{port}", "password": "hush-hush"})
        with pytest.raises(QueueError, match=r"unknown command `HELLO`") as caught:
            async with asyncio.timeout(ANSWER_SECONDS):
                await connect(queue_config.model_copy(update={"redis": section}))
    assert "hush" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("num_switches", range(0, 60, 2))
async def test_a_cancelled_call_always_ends(queue_config: Config, num_switches: int) -> None:
    """If a library lost a cancellation, a service would never stop."""
    queue = await connect(queue_config)
    worker = make_worker(queue, queue_config)
    beating = asyncio.create_task(worker.keep_alive())
    for _ in range(num_switches):
        await asyncio.sleep(0)
    beating.cancel()
    done, _ = await asyncio.wait({beating}, timeout=ANSWER_SECONDS)
    assert done, "the cancellation was lost"
    await queue.close()


async def test_a_script_that_the_server_forgot_and_a_connection_that_it_closed_are_no_errors(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await issue(trainer, 0, 1, 2)
    worker = make_worker(queue, queue_config)
    assert await worker.take(Stage.TICKETS) is not None
    await queue.client.script_flush()
    assert await worker.take(Stage.TICKETS) is not None
    await queue.client.client_kill_filter(_type="normal", skipme=False)
    assert await worker.take(Stage.TICKETS) is not None
    assert worker.num_held == 3


async def test_a_wait_whose_connection_breaks_goes_on(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    worker = make_worker(queue, queue_config)
    assert await worker.take(Stage.TICKETS) is None
    waiting = asyncio.create_task(worker.wait(timeout_seconds=600))
    await asyncio.sleep(0.1)
    await queue.client.client_kill_filter(_type="normal", skipme=True)
    await asyncio.sleep(0.1)
    await issue(trainer, 0)
    async with asyncio.timeout(ANSWER_SECONDS):
        await waiting
    assert await worker.take(Stage.TICKETS) is not None


async def test_a_wait_whose_connection_breaks_near_its_end_is_no_error(queue_config: Config) -> None:
    """It begins again with all of its time, beyond that of one call."""
    section = queue_config.redis.model_copy(update={"timeout_seconds": 2.0})
    patient = await connect(queue_config.model_copy(update={"redis": section}))
    try:
        worker = make_worker(patient, queue_config)
        assert await worker.take(Stage.TICKETS) is None
        waiting = asyncio.create_task(worker.wait(timeout_seconds=4.0))
        await asyncio.sleep(3.0)
        await patient.client.client_kill_filter(_type="normal", skipme=True)
        await waiting
    finally:
        await patient.close()


async def test_a_frozen_redis_is_named(redis_server: EmbeddedServer, queue_config: Config) -> None:
    section = queue_config.redis.model_copy(update={"timeout_seconds": 2.0})
    queue = await connect(queue_config.model_copy(update={"redis": section}))
    assert redis_server.process is not None
    redis_server.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(QueueError, match=r"no answer within 2 s \(redis\.timeout_seconds"):
            await queue.depths()
    finally:
        redis_server.process.send_signal(signal.SIGCONT)
        await queue.close()


async def test_a_server_without_a_connection_left_is_named(queue: Queue, queue_config: Config) -> None:
    section = queue_config.redis.model_copy(update={"timeout_seconds": 2.0})
    most = (await queue.client.config_get("maxclients"))["maxclients"]
    try:
        await queue.client.config_set("maxclients", "1")
        with pytest.raises(QueueError, match=r"connections that the server allows are in use.* raise its maxclients"):
            await connect(queue_config.model_copy(update={"redis": section}))
    finally:
        await queue.client.config_set("maxclients", str(most))
