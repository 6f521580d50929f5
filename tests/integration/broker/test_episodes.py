"""The finished episodes of a ticket, on a real server: kept beside its entry, for whoever holds the entry next."""

import asyncio

import pytest

from penstock.broker import Delivery, Queue, Stage, Worker, connect
from penstock.broker.trainer import TrainerQueue
from penstock.broker.worker import EPISODES_TTL_MS
from penstock.config import Config
from penstock.errors import StrangerError
from tests.integration.broker.queue_setup import issue, make_group, make_ticket, make_worker
from tests.patience import ANSWER_SECONDS


async def taken(worker: Worker) -> Delivery:
    delivery = await worker.take(Stage.TICKETS)
    assert delivery is not None
    return delivery


async def episode_keys(queue: Queue) -> list[str]:
    pattern = queue.keys.name("episodes:*")
    return [key.decode() async for key in queue.client.scan_iter(match=pattern, count=500)]


async def test_the_first_episode_of_an_index_stays(trainer: TrainerQueue, queue: Queue, queue_config: Config) -> None:
    await issue(trainer, 0)
    worker = make_worker(queue, queue_config)
    delivery = await taken(worker)
    assert await worker.stored_episodes(delivery) == {}
    for data in (b"first", b"second"):
        assert await worker.store_episode(delivery, 1, data)
    assert await worker.store_episode(delivery, 0, b"other")
    assert await worker.stored_episodes(delivery) == {0: b"other", 1: b"first"}


async def test_the_next_holder_has_them_and_a_late_one_adds_none(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await issue(trainer, 0)
    late, worker = make_worker(queue, queue_config), make_worker(queue, queue_config)
    held = await taken(late)
    assert await late.store_episode(held, 0, b"made in time")
    await late.retire()
    again = await taken(worker)
    assert not await late.store_episode(held, 1, b"too late")
    assert await worker.stored_episodes(again) == {0: b"made in time"}
    assert await worker.hand_over(again, make_group(make_ticket(0)), Stage.ROLLOUTS)
    assert not await late.store_episode(held, 1, b"too late")
    assert await episode_keys(queue) == []


async def test_they_stay_when_the_ticket_is_given_back_and_end_with_its_hand_over(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await issue(trainer, 0)
    first, second = make_worker(queue, queue_config), make_worker(queue, queue_config)
    delivery = await taken(first)
    await first.store_episode(delivery, 1, b"one")
    await first.give_back(delivery)
    again = await taken(second)
    assert await second.stored_episodes(again) == {1: b"one"}
    assert await second.hand_over(again, make_group(make_ticket(0)), Stage.ROLLOUTS)
    assert await episode_keys(queue) == []


@pytest.mark.parametrize("end", ["bury", "poison"])
async def test_a_dead_letter_has_none(trainer: TrainerQueue, queue: Queue, queue_config: Config, end: str) -> None:
    await issue(trainer, 0)
    worker = make_worker(queue, queue_config)
    delivery = await taken(worker)
    await worker.store_episode(delivery, 0, b"one")
    if end == "bury":
        assert await worker.bury(delivery, "malformed")
    else:
        for _ in range(queue_config.staleness.max_deliveries):
            await worker.give_back(delivery, failed=True, reason="failed")
            delivery = await worker.take(Stage.TICKETS) or delivery
    assert (await queue.depths())["dead"] == 1
    assert await episode_keys(queue) == []


async def test_another_message_of_the_same_ticket_begins_without_any(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    """As after `run.existing replace`: the new run has a ticket of this number and attempt, and other weights."""
    await issue(trainer, 0)
    late, worker = make_worker(queue, queue_config), make_worker(queue, queue_config)
    held = await taken(late)
    await late.store_episode(held, 0, b"of the run before")
    for key in (queue.keys.stream(Stage.TICKETS), queue.keys.live):
        await queue.client.delete(key)
    await queue.check_server()
    await issue(trainer, 0)
    again = await taken(worker)
    assert again.entry_id != held.entry_id
    assert not await late.store_episode(held, 1, b"of the run before")
    assert await worker.stored_episodes(again) == {}


async def test_they_expire_unless_their_holder_renews_them(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await issue(trainer, 0)
    first, second = make_worker(queue, queue_config), make_worker(queue, queue_config)
    delivery = await taken(first)
    await first.store_episode(delivery, 0, b"one")
    [key] = await episode_keys(queue)
    assert 0 < await queue.client.pttl(key) <= EPISODES_TTL_MS

    async def renewed(worker: Worker) -> bool:
        await queue.client.pexpire(key, EPISODES_TTL_MS // 2)
        await worker._renew()
        return int(await queue.client.pttl(key)) > EPISODES_TTL_MS // 2

    assert await renewed(first)
    await first.give_back(delivery)
    assert not await renewed(first)
    again = await taken(second)
    await second.stored_episodes(again)
    assert await renewed(second)


async def test_a_full_redis_delays_an_episode_and_loses_none(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await issue(trainer, 0)
    worker = make_worker(queue, queue_config)
    delivery = await taken(worker)
    await queue.client.config_set("maxmemory", "1mb")
    try:
        storing = asyncio.create_task(worker.store_episode(delivery, 0, bytes(1000)))
        await asyncio.sleep(0.5)
        assert not storing.done()
        assert await episode_keys(queue) == []
    finally:
        await queue.client.config_set("maxmemory", "0")
    async with asyncio.timeout(ANSWER_SECONDS):
        assert await storing
    assert await worker.stored_episodes(delivery) == {0: bytes(1000)}


async def test_a_stranger_adds_none(trainer: TrainerQueue, queue: Queue, queue_config: Config) -> None:
    await issue(trainer, 0)
    worker = make_worker(queue, queue_config)
    delivery = await taken(worker)
    other = await connect(queue_config.model_copy(update={"kl_ctl": 0.5}))
    try:
        worker._queue = other
        with pytest.raises(StrangerError):
            await worker.store_episode(delivery, 0, b"one")
    finally:
        await other.close()
    assert await episode_keys(queue) == []
