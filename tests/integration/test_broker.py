"""Hand-over, redelivery, dead letters, fencing: against a real server."""

import asyncio
import signal

import pytest

from penstock.broker import Announcement, Queue, Stage, Worker, connect
from penstock.broker.embedded import EmbeddedServer
from penstock.broker.keys import GROUP
from penstock.broker.lease import Lease, acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import (
    Completion,
    PolicyIdentity,
    RolloutGroup,
    Sampling,
    Ticket,
    VersionSpan,
    decode,
    pack_float32,
    pack_int32,
)
from penstock.errors import ConfigError, FencedError, LostWritesError, QueueError, StallError
from penstock.ledger import DropRecord, RunRecord, StepRecord

POLICY = PolicyIdentity(0, "0123456789abcdef")


def make_ticket(number: int, attempt: int = 0) -> Ticket:
    return Ticket(
        purpose="train",
        number=number,
        attempt=attempt,
        policy_version=0,
        prompt="1+1=",
        prompt_ids=pack_int32([1, 2, 3]),
        seeds=(number, number + 1),
        sampling=Sampling(1.0, 4, (2,)),
        answer="2",
        reward="",
        metadata={},
    )


def make_group(ticket: Ticket) -> RolloutGroup:
    completion = Completion(
        pack_int32([5, 2]), b"\x01\x01", pack_float32([-0.5, -0.1]), (VersionSpan(POLICY, 0, 2),), "2", "stop"
    )
    return RolloutGroup(ticket, (completion, completion), "server", 1.0, 2.0)


@pytest.fixture
async def trainer(queue: Queue, queue_config: Config) -> TrainerQueue:
    return TrainerQueue(queue, await acquire_lease(queue, queue_config))


async def issue(trainer: TrainerQueue, *numbers: int) -> None:
    await trainer.issue([make_ticket(number) for number in numbers])


def make_worker(queue: Queue, config: Config, name: str = "worker") -> Worker:
    return Worker(queue, name, config.staleness)


async def test_a_ticket_goes_through_all_stages(trainer: TrainerQueue, queue: Queue, queue_config: Config) -> None:
    await issue(trainer, 0)
    worker = make_worker(queue, queue_config)
    delivery = await worker.take(Stage.TICKETS)
    assert delivery is not None
    ticket = decode(delivery.payload, Ticket)
    assert ticket == make_ticket(0)
    assert await worker.hand_over(delivery, make_group(ticket), Stage.ROLLOUTS)
    assert await queue.depths() == {"tickets": 0, "eval": 0, "rollouts": 1, "scored": 0, "dead": 0}
    assert (await trainer.live())[0].startswith("rollouts|")
    received = await worker.take(Stage.ROLLOUTS)
    assert received is not None
    assert decode(received.payload, RolloutGroup) == make_group(ticket)


async def test_work_of_a_dead_worker_goes_to_another_and_its_late_result_nowhere(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await issue(trainer, 0)
    dead, living = make_worker(queue, queue_config, "dead"), make_worker(queue, queue_config, "living")
    first = await dead.take(Stage.TICKETS)
    assert first is not None
    assert await living.take(Stage.TICKETS) is None
    await asyncio.sleep(0.7)
    second = await living.take(Stage.TICKETS)
    assert second is not None
    assert second.entry_id == first.entry_id
    group = make_group(make_ticket(0))
    assert await dead.hand_over(first, group, Stage.ROLLOUTS) is False
    assert (await queue.depths())["rollouts"] == 0
    assert await living.hand_over(second, group, Stage.ROLLOUTS) is True


async def test_a_heartbeat_keeps_work(trainer: TrainerQueue, queue: Queue, queue_config: Config) -> None:
    await issue(trainer, 0)
    busy, idle = make_worker(queue, queue_config), make_worker(queue, queue_config)
    delivery = await busy.take(Stage.TICKETS)
    assert delivery is not None
    beating = asyncio.create_task(busy.keep_alive())
    try:
        await asyncio.sleep(0.9)
        assert await idle.take(Stage.TICKETS) is None
    finally:
        beating.cancel()


async def test_an_entry_whose_delivery_was_lost_on_the_way_comes_back_to_the_only_worker(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    """A take that is repeated after a broken connection leaves an entry that its holder does not know of."""
    await issue(trainer, 0)
    worker = make_worker(queue, queue_config)
    first = await worker.take(Stage.TICKETS)
    assert first is not None
    assert await worker.take(Stage.TICKETS) is None
    stream = queue.keys.stream(Stage.TICKETS)
    too_long = int(queue_config.staleness.claim_idle_seconds * 1000) + 1
    await queue.client.xclaim(stream, GROUP, worker.name, 0, [first.entry_id], idle=too_long, justid=True)
    again = await worker.take(Stage.TICKETS)
    assert again is not None
    assert again.entry_id == first.entry_id


async def test_an_older_server_gets_nothing(trainer: TrainerQueue, queue: Queue, queue_config: Config) -> None:
    announcement = Announcement(PolicyIdentity(3, "ab" * 8), "/weights", trainer.lease.number)
    await trainer.issue([make_ticket(0)], announcement)
    worker = make_worker(queue, queue_config)
    assert await worker.take(Stage.TICKETS, held_version=2) is None
    assert await worker.take(Stage.TICKETS, held_version=3) is not None
    assert await queue.announced() == announcement


async def test_a_given_back_entry_is_free_at_once(trainer: TrainerQueue, queue: Queue, queue_config: Config) -> None:
    await issue(trainer, 0)
    first, second = make_worker(queue, queue_config), make_worker(queue, queue_config)
    delivery = await first.take(Stage.TICKETS)
    assert delivery is not None
    await first.give_back(delivery, failed=True, reason="refused")
    again = await second.take(Stage.TICKETS)
    assert again is not None
    assert (again.failures, again.engine_deaths) == (1, 0)


async def test_failures_up_to_the_limit_make_poison(trainer: TrainerQueue, queue: Queue, queue_config: Config) -> None:
    await issue(trainer, 0)
    worker = make_worker(queue, queue_config)
    for _ in range(queue_config.staleness.max_deliveries):
        delivery = await worker.take(Stage.TICKETS)
        assert delivery is not None
        await worker.give_back(delivery, failed=True, reason="the engine refused it")
    assert await worker.take(Stage.TICKETS) is None
    note = await worker.take(Stage.SCORED)
    assert note is not None
    assert (note.ticket_key, note.reason, note.payload) == ("0", "the engine refused it", b"")
    assert (await queue.depths())["dead"] == 1


async def test_a_malformed_message_is_buried_and_the_trainer_hears_of_it(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await queue.client.xadd(queue.keys.stream(Stage.ROLLOUTS), {"t": "0", "a": "0", "p": b"\xff\x00garbage"})
    worker = make_worker(queue, queue_config)
    delivery = await worker.take(Stage.ROLLOUTS)
    assert delivery is not None
    await worker.bury(delivery, "not a RolloutGroup")
    note = await worker.take(Stage.SCORED)
    assert note is not None
    assert note.reason == "not a RolloutGroup"


async def test_wait_misses_nothing(trainer: TrainerQueue, queue: Queue, queue_config: Config) -> None:
    worker = make_worker(queue, queue_config)
    assert await worker.take(Stage.TICKETS) is None
    await issue(trainer, 0)
    async with asyncio.timeout(1):
        await worker.wait(Stage.TICKETS, timeout_seconds=3)
    assert await worker.take(Stage.TICKETS) is not None


async def test_commit_is_one_change_and_is_not_repeated(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await trainer.append(RunRecord("d", 10, 1, 2, 0))
    await issue(trainer, 0, 1)
    worker = make_worker(queue, queue_config)
    entries = {}
    for number in (0, 1):
        delivery = await worker.take(Stage.TICKETS)
        assert delivery is not None
        await worker.hand_over(delivery, make_group(make_ticket(number)), Stage.SCORED)
        scored = await worker.take(Stage.SCORED)
        assert scored is not None
        entries[number] = scored.entry_id
    record = StepRecord(0, (0,), "00000000.1.pack", "ff")
    await trainer.commit_step(record, {0: entries[0]})
    await trainer.commit_step(record, {0: entries[0]})
    await trainer.drop(DropRecord(1, "poison"), entries[1])
    ledger = await trainer.ledger()
    assert ledger.steps == [record]
    assert ledger.trained == {0: 0}
    assert ledger.dropped == {1: "poison"}
    counters = await trainer.counters()
    assert (counters.issued, counters.trained, dict(counters.dropped), counters.outstanding) == (2, 1, {"poison": 1}, 0)
    assert (await queue.depths())["scored"] == 0
    assert list(await trainer.live()) == [0]
    await trainer.issue([], Announcement(POLICY, "/w", 1), resolved=[0])
    assert await trainer.live() == {}


async def test_issuing_twice_issues_once(trainer: TrainerQueue, queue: Queue) -> None:
    await issue(trainer, 0, 1)
    await issue(trainer, 0, 1)
    assert (await queue.depths())["tickets"] == 2
    assert (await trainer.counters()).issued == 2
    await trainer.issue([make_ticket(0, attempt=1)])
    assert (await queue.depths())["tickets"] == 3
    assert (await trainer.counters()).issued == 2


async def test_a_trainer_without_the_lease_can_change_nothing(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await issue(trainer, 0)
    await asyncio.sleep(0.7)
    successor = await acquire_lease(queue, queue_config)
    assert successor.number == trainer.lease.number + 1
    for call in (
        issue(trainer, 1),
        trainer.append(RunRecord("d", 1, 1, 1, 0)),
        trainer.commit_step(StepRecord(0, (0,), "f", "d"), {}),
        trainer.drop(DropRecord(0, "poison"), ""),
    ):
        with pytest.raises(FencedError):
            await call
    assert (await trainer.counters()).issued == 1


async def test_an_expired_lease_that_nobody_took_is_held_again(trainer: TrainerQueue, queue: Queue) -> None:
    await asyncio.sleep(0.6)  # its renewal was never started: as if the process had been frozen
    assert await queue.client.get(queue.keys.lease) is None
    await issue(trainer, 0)
    assert await queue.client.get(queue.keys.lease) == trainer.lease.token.encode()


async def test_an_expired_lease_that_another_had_is_not_held_again(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await asyncio.sleep(0.6)
    successor = await acquire_lease(queue, queue_config)
    await asyncio.to_thread(successor.release)
    with pytest.raises(LostWritesError, match="held by nobody"):
        await issue(trainer, 0)


async def test_a_lease_number_that_the_queue_forgot_is_not_given_out_again(queue: Queue, queue_config: Config) -> None:
    assert (await acquire_lease(queue, queue_config, above=7)).number == 8


async def test_a_ledger_that_lost_its_end_is_not_continued(trainer: TrainerQueue, queue: Queue) -> None:
    await trainer.append(RunRecord("d", 1, 1, 2, 0))
    await trainer.ledger()
    await trainer.commit_step(StepRecord(0, (0,), "f", "d"), {})
    assert await trainer.ends_as_written()
    await queue.client.xtrim(queue.keys.ledger, maxlen=0, approximate=False)
    assert not await trainer.ends_as_written()
    with pytest.raises(LostWritesError, match="ledger ends with"):
        await trainer.commit_step(StepRecord(1, (1,), "f", "d"), {})


async def test_a_held_lease_is_waited_for_and_then_named(queue: Queue, queue_config: Config) -> None:
    lease = await acquire_lease(queue, queue_config)
    lost: list[QueueError] = []
    lease.start_renewing(lost.append)
    try:
        short = queue_config.model_copy(update={"run": queue_config.run.model_copy(update={"stall_seconds": 1.0})})
        with pytest.raises(StallError, match=r"run\.stall_seconds"):
            await acquire_lease(queue, short)
    finally:
        await asyncio.to_thread(lease.release)
    assert lost == []
    assert isinstance(await acquire_lease(queue, queue_config), Lease)


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
    await issue(trainer, 0)
    worker = make_worker(queue, queue_config)
    delivery = await worker.take(Stage.TICKETS)
    assert delivery is not None
    await queue.client.config_set("maxmemory", "1mb")
    try:
        moving = asyncio.create_task(worker.hand_over(delivery, make_group(make_ticket(0)), Stage.ROLLOUTS))
        await asyncio.sleep(0.5)
        assert not moving.done()
        assert (await queue.depths())["rollouts"] == 0
    finally:
        await queue.client.config_set("maxmemory", "0")
    async with asyncio.timeout(5):
        assert await moving is True


async def test_a_queue_that_is_too_small_is_refused(queue: Queue) -> None:
    await queue.client.config_set("maxmemory", "100mb")
    try:
        await queue.check_memory(50 * 2**20)
        with pytest.raises(ConfigError, match="maxmemory"):
            await queue.check_memory(200 * 2**20)
    finally:
        await queue.client.config_set("maxmemory", "0")


async def test_an_unreachable_redis_is_named(queue_config: Config) -> None:

    gone = queue_config.model_copy(
        update={"redis": queue_config.redis.model_copy(update={"url": "redis://127.0.0.1:1/0", "timeout_seconds": 0.5})}
    )
    with pytest.raises(QueueError, match=r"redis\.url redis://127\.0\.0\.1:1/0"):
        async with asyncio.timeout(20):
            await connect(gone)


async def test_a_wrong_password_is_named_at_once(queue_config: Config) -> None:
    section = type(queue_config.redis).model_validate(
        {"url": queue_config.redis.url, "password": "wrong", "timeout_seconds": 30}
    )
    with pytest.raises(ConfigError, match=r"redis\.password"):
        async with asyncio.timeout(5):
            await connect(queue_config.model_copy(update={"redis": section}))


@pytest.mark.parametrize("num_switches", range(0, 60, 2))
async def test_a_cancelled_call_always_ends(queue_config: Config, num_switches: int) -> None:
    """A cancellation that a library loses would keep a service from ever stopping."""
    queue = await connect(queue_config)
    worker = make_worker(queue, queue_config)
    beating = asyncio.create_task(worker.keep_alive())
    for _ in range(num_switches):
        await asyncio.sleep(0)
    beating.cancel()
    done, _ = await asyncio.wait({beating}, timeout=2)
    assert done, "the cancellation was lost"
    await queue.close()


async def test_a_frozen_redis_is_named(redis_server: EmbeddedServer, queue_config: Config) -> None:
    section = queue_config.redis.model_copy(update={"timeout_seconds": 1.0})
    queue = await connect(queue_config.model_copy(update={"redis": section}))
    assert redis_server.process is not None
    redis_server.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(QueueError, match=r"no answer within 1 s \(redis\.timeout_seconds"):
            await queue.depths()
    finally:
        redis_server.process.send_signal(signal.SIGCONT)
        await queue.close()
