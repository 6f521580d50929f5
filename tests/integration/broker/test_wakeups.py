"""Who is woken for an entry, and when entries of dead holders are looked for: both must not grow with the workers."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from penstock.broker import Delivery, Queue, Served, Stage, Worker, connect
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import PolicyIdentity, ServiceKind
from penstock.contracts.services import Announcement, ServiceRecord
from tests.integration.broker.queue_setup import (
    expire_beat,
    issue,
    make_group,
    make_ticket,
    make_worker,
)
from tests.patience import ANSWER_SECONDS

NEVER_SECONDS = 600.0


async def taken(worker: Worker, stage: Stage = Stage.TICKETS) -> Delivery:
    delivery = await worker.take(stage)
    assert delivery is not None
    return delivery


@asynccontextmanager
async def waiting(queue: Queue, workers: Sequence[Worker]) -> AsyncIterator[list["asyncio.Task[None]"]]:
    """All workers wait for tickets, in this order, on the server."""
    tasks: list[asyncio.Task[None]] = []
    queue.longest_block_seconds = NEVER_SECONDS
    for worker in workers:
        assert await worker.take(Stage.TICKETS) is None
        tasks.append(asyncio.create_task(worker.wait(timeout_seconds=NEVER_SECONDS)))
        async with asyncio.timeout(ANSWER_SECONDS):
            while (await queue.client.info("clients"))["blocked_clients"] < len(tasks):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_one_entry_wakes_the_one_that_has_waited_longest(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    async with waiting(queue, [make_worker(queue, queue_config) for _ in range(3)]) as tasks:
        await issue(trainer, 0)
        async with asyncio.timeout(ANSWER_SECONDS):
            await tasks[0]
        assert (await queue.client.info("clients"))["blocked_clients"] == 2


async def test_each_entry_wakes_another(trainer: TrainerQueue, queue: Queue, queue_config: Config) -> None:
    async with waiting(queue, [make_worker(queue, queue_config) for _ in range(3)]) as tasks:
        await issue(trainer, 0, 1, 2)
        async with asyncio.timeout(ANSWER_SECONDS):
            await asyncio.gather(*tasks)


async def test_whoever_takes_wakes_the_next_while_entries_are_free(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    """Also if the wake-up of an entry went to a worker that died of it."""
    workers = [make_worker(queue, queue_config) for _ in range(3)]
    async with waiting(queue, workers) as tasks:
        await issue(trainer, 0, 1)
        async with asyncio.timeout(ANSWER_SECONDS):
            await asyncio.gather(*tasks[:2])
        await taken(workers[0])  # the second never takes
        async with asyncio.timeout(ANSWER_SECONDS):
            await tasks[2]


async def test_more_entries_than_are_woken_at_once_are_all_taken_by_those_who_waited(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    number = 70  # 64 are woken, and wake the others
    workers = [make_worker(queue, queue_config) for _ in range(number)]

    async def take_one(worker: Worker) -> str:
        while (delivery := await worker.take(Stage.TICKETS)) is None:
            await worker.wait(timeout_seconds=NEVER_SECONDS)
        return delivery.ticket_key

    queue.longest_block_seconds = NEVER_SECONDS
    async with asyncio.timeout(ANSWER_SECONDS):
        taking = [asyncio.create_task(take_one(worker)) for worker in workers]
        while (await queue.client.info("clients"))["blocked_clients"] < number:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await issue(trainer, *range(number))
        keys = await asyncio.gather(*taking)
    assert sorted(map(int, keys)) == list(range(number))


async def test_wakeups_of_entries_that_others_have_taken_are_forgotten(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    worker, other = make_worker(queue, queue_config), make_worker(queue, queue_config)
    assert await worker.take(Stage.TICKETS) is None
    await issue(trainer, 0)
    woken = queue.keys.woken(worker.name)
    assert 0 < await queue.client.pttl(woken) <= 10_000
    await taken(other)
    assert await worker.take(Stage.TICKETS) is None
    assert await queue.client.exists(woken) == 0


async def test_a_server_that_is_behind_takes_no_wakeup_from_others(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    announcement = Announcement(PolicyIdentity(3, "ab" * 8), "/weights", trainer.lease.number)
    await trainer.issue([make_ticket(0)], announcement)
    behind = make_worker(queue, queue_config)
    assert await behind.take(Stage.TICKETS, served=Served(PolicyIdentity(2, "ab" * 8), trainer.lease.number)) is None
    await behind.wait(timeout_seconds=0.001)
    assert await queue.client.zcard(queue.keys.waiting(Stage.TICKETS)) == 0


async def test_a_server_that_fell_behind_after_it_was_woken_wakes_another(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    behind, current = (make_worker(queue, queue_config) for _ in range(2))
    async with waiting(queue, [behind, current]) as tasks:
        await issue(trainer, 0)
        async with asyncio.timeout(ANSWER_SECONDS):
            await tasks[0]
        await trainer.issue([], Announcement(PolicyIdentity(3, "ab" * 8), "/weights", trainer.lease.number))
        assert (
            await behind.take(Stage.TICKETS, served=Served(PolicyIdentity(2, "ab" * 8), trainer.lease.number)) is None
        )
        async with asyncio.timeout(ANSWER_SECONDS):
            await tasks[1]


async def test_a_full_server_tells_one_that_is_behind_so(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    announcement = Announcement(PolicyIdentity(3, "ab" * 8), "/weights", trainer.lease.number)
    await trainer.issue([make_ticket(0)], announcement)
    behind, current = make_worker(queue, queue_config), make_worker(queue, queue_config)
    await behind._beat()
    await queue.client.zadd(queue.keys.waiting(Stage.TICKETS), {current.name: 2**52})
    try:
        await queue.client.config_set("maxmemory", "1mb")
        async with asyncio.timeout(ANSWER_SECONDS):
            assert (
                await behind.take(Stage.TICKETS, served=Served(PolicyIdentity(2, "ab" * 8), trainer.lease.number))
                is None
            )
    finally:
        await queue.client.config_set("maxmemory", "0")


async def test_what_a_dead_worker_held_is_found_without_a_hand_in_time(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await issue(trainer, 0)
    dead, living = make_worker(queue, queue_config, "dead"), make_worker(queue, queue_config, "living")
    first = await taken(dead)
    await expire_beat(queue, dead)
    await queue.client.set(queue.keys.looked(Stage.TICKETS), "1", px=100)  # somebody has looked just before
    assert await living.take(Stage.TICKETS) is None
    async with asyncio.timeout(ANSWER_SECONDS):
        while (found := await living.take(Stage.TICKETS)) is None:
            await living.wait(timeout_seconds=0.05)
    assert found.entry_id == first.entry_id


async def test_one_worker_looks_for_all(trainer: TrainerQueue, queue: Queue, queue_config: Config) -> None:
    await issue(trainer, 0, 1)
    dead, *living = (make_worker(queue, queue_config) for _ in range(3))
    for _ in range(2):
        await taken(dead)
    await expire_beat(queue, dead)
    assert (await taken(living[0])).ticket_key == "0"
    assert await queue.client.pttl(queue.keys.looked(Stage.TICKETS)) > 0
    assert (await taken(living[1])).ticket_key == "1"  # which the first look has made free


async def test_a_look_that_has_not_found_all_is_followed_by_another(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    number = 1005
    await issue(trainer, *range(number))
    dead, living = make_worker(queue, queue_config, "dead"), make_worker(queue, queue_config, "living")
    assert len(await dead.take_several(Stage.TICKETS, number)) == number
    await expire_beat(queue, dead)
    assert len(await living.take_several(Stage.TICKETS, number)) == 1000
    assert len(await living.take_several(Stage.TICKETS, number)) == 5


async def test_a_full_server_still_gives_out_what_lies_in_it(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    """Else nobody could ever make room."""
    await issue(trainer, 0, 1)
    dead, living = make_worker(queue, queue_config, "dead"), make_worker(queue, queue_config, "living")
    await taken(dead)
    await living._beat()
    await expire_beat(queue, dead)
    try:
        await queue.client.config_set("maxmemory", "1mb")
        assert [(await taken(living)).ticket_key for _ in range(2)] == ["0", "1"]
        assert await living.take(Stage.TICKETS) is None
    finally:
        await queue.client.config_set("maxmemory", "0")


async def test_a_given_back_entry_wakes_one_and_is_in_nobodys_hands(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    worker = make_worker(queue, queue_config)
    await issue(trainer, 0)
    delivery = await taken(worker)
    async with waiting(queue, [make_worker(queue, queue_config)]) as [task]:
        await worker.give_back(delivery)
        async with asyncio.timeout(ANSWER_SECONDS):
            await task
    assert await queue.whereabouts(0) == "which nobody has taken from tickets"


async def test_a_wakeup_of_one_stage_does_not_leave_another_asleep(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    """A worker that waits for two stages may take the entry of the one, with the wake-up of the other."""
    both, tickets_only = make_worker(queue, queue_config), make_worker(queue, queue_config)
    assert await both.take(Stage.EVAL, Stage.TICKETS) is None
    async with waiting(queue, [tickets_only]) as [task]:
        await trainer.issue_eval([make_ticket(7)])
        await issue(trainer, 0)
        async with asyncio.timeout(ANSWER_SECONDS):
            await both.wait(timeout_seconds=NEVER_SECONDS)
        delivery = await both.take(Stage.EVAL, Stage.TICKETS)
        assert delivery is not None
        assert delivery.stage is Stage.EVAL
        async with asyncio.timeout(ANSWER_SECONDS):
            await task


async def test_whoever_has_room_and_leaves_no_entry_is_woken_by_the_next(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    """One call takes an entry and waits for the next: an entry costs as much however many workers share the work."""
    await issue(trainer, 0, 1)
    worker = make_worker(queue, queue_config)
    queue.longest_block_seconds = NEVER_SECONDS
    for is_last in (False, True):
        assert await worker.take(Stage.EVAL, Stage.TICKETS, has_room=True) is not None
        assert worker.expects_wakeup is is_last
    waiting_on = asyncio.create_task(worker.wait(timeout_seconds=NEVER_SECONDS))
    await issue(trainer, 2)
    async with asyncio.timeout(ANSWER_SECONDS):
        await waiting_on
    assert (await taken(worker)).ticket_key == "2"


async def test_all_that_wait_get_an_entry_before_any_gets_two(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    """More than are woken at once: whoever takes one wakes the next, and waits behind all others."""
    workers = [make_worker(queue, queue_config, str(number)) for number in range(70)]
    for worker in workers:
        assert await worker.take(Stage.TICKETS, has_room=True) is None
    await issue(trainer, *range(100))
    woken, taken_by, num_empty = list[Worker](), Counter[str](), 0
    while taken_by.total() < 100:
        for worker in workers:
            if worker not in woken and await queue.client.exists(queue.keys.woken(worker.name)):
                woken.append(worker)
        worker = woken.pop(0)
        if await worker.take(Stage.TICKETS, has_room=True) is None:
            num_empty += 1
        else:
            taken_by[worker.name] += 1
        assert worker.expects_wakeup
    assert len(taken_by) == 70
    assert set(taken_by.values()) == {1, 2}
    assert num_empty == 0


async def test_a_worker_without_room_is_not_woken(trainer: TrainerQueue, queue: Queue, queue_config: Config) -> None:
    await issue(trainer, 0)
    full, other = make_worker(queue, queue_config), make_worker(queue, queue_config)
    await taken(full)
    assert not full.expects_wakeup
    async with waiting(queue, [other]) as [task]:
        await issue(trainer, 1)
        async with asyncio.timeout(ANSWER_SECONDS):
            await task


@pytest.mark.parametrize("handed_over", [True, False])
async def test_consumers_that_are_dead_and_hold_nothing_are_forgotten_once_a_minute(
    trainer: TrainerQueue, queue: Queue, queue_config: Config, handed_over: bool
) -> None:
    await issue(trainer, 0)
    empty, holding, living = (make_worker(queue, queue_config, name) for name in ("empty", "holding", "living"))
    delivery = await taken(holding)
    if handed_over:
        assert await holding.hand_over(delivery, make_group(make_ticket(0)), Stage.ROLLOUTS)
    assert await empty.take(Stage.TICKETS) is None
    await expire_beat(queue, holding)
    await expire_beat(queue, empty)
    await living._beat()
    assert empty.name in await beating(queue)  # the first beat of a minute was before they died
    await queue.delete([queue.keys.tidied])
    await living._beat()
    assert empty.name in await beating(queue)  # nor does this worker ask twice a minute
    joined = make_worker(queue, queue_config, "joined")
    await joined._beat()
    alive = {living.name, joined.name}
    expected = alive if handed_over else alive | {holding.name}
    assert await beating(queue) == expected
    consumers: Any = await queue.client.xinfo_consumers(queue.keys.stream(Stage.TICKETS), "penstock")
    assert {each["name"].decode() for each in consumers} == expected - alive


async def test_records_of_services_are_forgotten_an_hour_after_they_expired(queue: Queue, queue_config: Config) -> None:
    worker, services = make_worker(queue, queue_config), queue.keys.services
    now_ms = int(1000 * time.time())
    shown = "reward|abababababababab|{}"
    expired: Any = {"an hour ago": f"{now_ms - 3_660_000}|{shown}", "lately": f"{now_ms - 3_540_000}|{shown}"}
    expired["malformed"] = "shown"
    await queue.guard(queue.client.hset(services, mapping=expired))
    await worker._beat(ServiceRecord(ServiceKind.REWARD, worker.name, "http://127.0.0.1:1", 1, "ready"))
    assert [each.name for each in await queue.services()] == [worker.name]
    found: Any = await queue.guard(queue.client.hkeys(services))
    assert {name.decode() for name in found} == {"lately", worker.name}


async def beating(queue: Queue) -> set[str]:
    found: Any = await queue.guard(queue.client.hkeys(queue.keys.beats))
    return {name.decode() for name in found}


async def test_two_connections_of_a_service_are_enough(queue: Queue, queue_config: Config) -> None:
    """A thousand services are within a server's usual limit of ten thousand."""
    before = int((await queue.client.info("clients"))["connected_clients"])
    other = await connect(queue_config)
    try:
        worker = Worker(other, "worker", queue_config.staleness)
        beating_on = asyncio.create_task(worker.keep_alive())
        for _ in range(5):
            assert await worker.take(Stage.TICKETS) is None
            await worker.wait(timeout_seconds=0.01)
            assert await other.announced() is None
        after = int((await queue.client.info("clients"))["connected_clients"])
        beating_on.cancel()
        assert after - before <= 2
    finally:
        await other.close()


async def test_many_workers_together_ask_as_often_as_a_few(queue: Queue, queue_config: Config) -> None:
    others: Any = {f"rollout-{number}": 2**52 for number in range(511)}  # alive for ever
    alone = make_worker(queue, queue_config)
    await alone.take(Stage.TICKETS)
    assert alone.ask_seconds == 1.0
    await queue.client.hset(queue.keys.beats, mapping=others)
    one_of_many = make_worker(queue, queue_config)
    for _ in range(2):  # the second heartbeat does not count them again
        await one_of_many.take(Stage.TICKETS)
        assert one_of_many.ask_seconds == (1 + len(others) + 1) / 32
        await one_of_many._beat()


async def test_a_wait_may_be_longer_than_a_call(queue_config: Config) -> None:
    """redis.timeout_seconds is for a server that does not answer, not for one that keeps a wait as it was asked to."""
    section = queue_config.redis.model_copy(update={"timeout_seconds": 2.0})
    patient = await connect(queue_config.model_copy(update={"redis": section}))
    try:
        worker = make_worker(patient, queue_config)
        assert await worker.take(Stage.TICKETS) is None
        await worker.wait(timeout_seconds=2.5)
    finally:
        await patient.close()


async def test_dead_holders_are_looked_for_less_often_if_there_are_many(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    """A look costs as much as there are holders."""
    holders, stream, looked = 400, queue.keys.stream(Stage.TICKETS), queue.keys.looked(Stage.TICKETS)
    await issue(trainer, *range(holders))
    for number in range(holders):
        await queue.client.xreadgroup("penstock", f"holder-{number}", {stream: ">"}, count=1)
    worker = make_worker(queue, queue_config)
    left = -1
    async with asyncio.timeout(ANSWER_SECONDS):
        while left <= 250:  # the server, or this process, may have been away since the look
            await queue.delete([looked])
            await worker.take(Stage.TICKETS)
            left = await queue.client.pttl(looked)
    assert left <= holders


async def test_who_does_not_wait_any_more_is_not_woken(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    """Else the wake-up would be lost to a dead worker, or one that became busy, while another sleeps."""
    gone, living = make_worker(queue, queue_config, "gone"), make_worker(queue, queue_config, "living")
    assert await gone.take(Stage.TICKETS) is None
    await queue.client.zadd(queue.keys.waiting(Stage.TICKETS), {gone.name: 1})  # until long ago
    async with waiting(queue, [living]) as [task]:
        await issue(trainer, 0)
        async with asyncio.timeout(ANSWER_SECONDS):
            await task
    assert await queue.client.exists(queue.keys.woken(gone.name)) == 0


async def test_a_worker_that_waits_is_woken_though_a_hand_over_has_taken_an_entry(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    """A hand-over takes for another task of the same worker."""
    worker = make_worker(queue, queue_config)
    await issue(trainer, 0)
    delivery = await taken(worker)
    async with waiting(queue, [worker]) as [task]:
        await queue.client.xadd(queue.keys.stream(Stage.TICKETS), {"t": "1", "a": "0", "p": ""})  # wakes nobody
        group = make_group(make_ticket(0))
        moved, following = await worker.hand_over_and_take(delivery, group, Stage.ROLLOUTS, Stage.TICKETS)
        assert moved
        assert following is not None
        await issue(trainer, 2)
        async with asyncio.timeout(ANSWER_SECONDS):
            await task


async def test_a_worker_that_retires_takes_no_wakeup_from_others(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    retired, living = make_worker(queue, queue_config, "retired"), make_worker(queue, queue_config, "living")
    assert await retired.take(Stage.TICKETS) is None
    await retired.retire()
    async with waiting(queue, [living]) as [task]:
        await issue(trainer, 0)
        async with asyncio.timeout(ANSWER_SECONDS):
            await task
