"""The workers' side of the queue: hand-over, redelivery, heartbeats and dead letters, on a real server."""

import asyncio
from typing import Any

import pytest

from penstock.broker import Queue, Served, Stage, Worker
from penstock.broker.keys import GROUP
from penstock.broker.scripts import ScriptCall
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import PolicyIdentity, Ticket, decode
from penstock.contracts.ledger import StepRecord
from penstock.contracts.services import Announcement
from tests.integration.broker.queue_setup import (
    beats_until,
    expire_beat,
    issue,
    look_again,
    make_group,
    make_ticket,
    make_worker,
    read_group,
)
from tests.patience import ANSWER_SECONDS


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
    assert await read_group(worker, received) == make_group(ticket).without_text()


async def test_work_of_a_dead_worker_goes_to_another_and_its_late_result_is_refused(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await issue(trainer, 0)
    dead, living = make_worker(queue, queue_config, "dead"), make_worker(queue, queue_config, "living")
    first = await dead.take(Stage.TICKETS)
    assert first is not None
    assert await living.take(Stage.TICKETS) is None
    await expire_beat(queue, dead)
    second = await living.take(Stage.TICKETS)
    assert second is not None
    assert second.entry_id == first.entry_id
    group = make_group(make_ticket(0))
    assert await dead.hand_over(first, group, Stage.ROLLOUTS) is False
    assert (await queue.depths())["rollouts"] == 0
    assert await living.hand_over(second, group, Stage.ROLLOUTS) is True


async def test_a_hand_over_gives_the_next_entry(trainer: TrainerQueue, queue: Queue, queue_config: Config) -> None:
    await issue(trainer, 0, 1)
    worker = make_worker(queue, queue_config)
    first = await worker.take(Stage.EVAL, Stage.TICKETS)
    assert first is not None
    following = (Stage.ROLLOUTS, Stage.EVAL, Stage.TICKETS)
    moved, second = await worker.hand_over_and_take(first, make_group(make_ticket(0)), Stage.SCORED, *following)
    assert moved
    assert second is not None
    assert (second.stage, second.ticket_key, worker.num_held) == (Stage.TICKETS, "1", 1)
    moved, third = await worker.hand_over_and_take(first, make_group(make_ticket(0)), Stage.SCORED, *following)
    assert (moved, third, (await queue.depths())["scored"]) == (False, None, 1)


async def test_a_hand_over_to_a_server_that_is_behind_gives_nothing(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await issue(trainer, 0)
    await trainer.issue([make_ticket(1)], Announcement(PolicyIdentity(3, "ab" * 8), "/weights", trainer.lease.number))
    worker, served = make_worker(queue, queue_config), Served(PolicyIdentity(2, "ab" * 8), trainer.lease.number)
    first = await worker.take(Stage.TICKETS)
    assert first is not None
    group = make_group(make_ticket(0))
    assert await worker.hand_over_and_take(first, group, Stage.ROLLOUTS, Stage.TICKETS, served=served) == (True, None)
    assert (await queue.depths())["tickets"] == 1


async def test_several_are_taken_at_once_those_of_the_dead_first(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await issue(trainer, 0, 1, 2, 3)
    dead, living = make_worker(queue, queue_config, "dead"), make_worker(queue, queue_config, "living")
    assert [each.ticket_key for each in await dead.take_several(Stage.TICKETS, 2)] == ["0", "1"]
    await dead.retire()
    assert [each.ticket_key for each in await living.take_several(Stage.TICKETS, 3)] == ["0", "1", "2"]
    assert [each.ticket_key for each in await living.take_several(Stage.TICKETS, 3)] == ["3"]


async def test_a_trainers_first_look_takes_what_its_earlier_life_still_holds(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    """Its later ones are as rare as those of others: each costs the queue as much as there are held entries."""
    await issue(trainer, 0, 1)
    earlier, later = (Worker(queue, "trainer", queue_config.staleness, take_over=True) for _ in range(2))
    assert len(await earlier.take_several(Stage.TICKETS, 2)) == 2
    assert await queue.client.exists(queue.keys.looked(Stage.TICKETS))
    assert [each.ticket_key for each in await later.take_several(Stage.TICKETS, 2)] == ["0", "1"]
    await issue(trainer, 2)
    assert len(await make_worker(queue, queue_config).take_several(Stage.TICKETS, 1)) == 1
    await queue.guard(queue.client.set(queue.keys.looked(Stage.TICKETS), "1"))
    assert await later.take_several(Stage.TICKETS, 1) == []
    await look_again(queue)
    assert [each.ticket_key for each in await later.take_several(Stage.TICKETS, 1)] == ["2"]


async def test_a_heartbeat_keeps_work(trainer: TrainerQueue, queue: Queue, queue_config: Config) -> None:
    await issue(trainer, 0)
    staleness = queue_config.staleness.model_copy(update={"heartbeat_seconds": 0.3})  # so it beats every 0.1 s
    busy = Worker(queue, "busy", staleness)
    delivery = await busy.take(Stage.TICKETS)
    assert delivery is not None
    first = await beats_until(queue, busy)
    beating = asyncio.create_task(busy.keep_alive())
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            while await beats_until(queue, busy) <= first + 500:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    finally:
        beating.cancel()


async def test_a_worker_may_take_from_another_stage_while_it_renews(
    trainer: TrainerQueue, queue: Queue, queue_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    await issue(trainer, 0)
    await trainer.issue_eval([make_ticket(0)])
    worker, run = make_worker(queue, queue_config), queue.run
    assert await worker.take(Stage.TICKETS)

    async def take_and_run(call: ScriptCall) -> Any:
        monkeypatch.undo()
        assert await worker.take(Stage.EVAL)
        return await run(call)

    monkeypatch.setattr(queue, "run", take_and_run)
    await worker._renew()
    assert worker.num_held == 2


async def test_an_entry_whose_delivery_was_lost_on_the_way_comes_back_to_the_only_worker(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    """A take that is repeated after a broken connection leaves its holder an entry that it is not aware of."""
    await issue(trainer, 0)
    worker = make_worker(queue, queue_config)
    first = await worker.take(Stage.TICKETS)
    assert first is not None
    worker.forget(first)
    assert await worker.take(Stage.TICKETS) is None
    stream = queue.keys.stream(Stage.TICKETS)
    too_long = int(queue_config.staleness.claim_idle_seconds * 1000) + 1
    await queue.client.xclaim(stream, GROUP, worker.name, 0, [first.entry_id], idle=too_long, justid=True)
    await look_again(queue)
    again = await worker.take(Stage.TICKETS)
    assert again is not None
    assert again.entry_id == first.entry_id


async def test_a_server_that_was_refused_stays_so_while_it_hands_over(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    """It loads what is announced because it was refused: groups that end meanwhile must not keep it from that."""
    await issue(trainer, 0)
    worker, served = make_worker(queue, queue_config), Served(PolicyIdentity(2, "ab" * 8), trainer.lease.number)
    held = await worker.take(Stage.TICKETS)
    assert held is not None
    await trainer.issue([], Announcement(PolicyIdentity(3, "ab" * 8), "/weights", trainer.lease.number))
    assert await worker.take(Stage.TICKETS, served=served) is None
    assert await worker.hand_over(held, make_group(make_ticket(0)), Stage.ROLLOUTS)
    assert worker.refused


async def test_no_server_gets_a_ticket_before_a_version_is_announced(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    """It may have been pushed one already."""
    await trainer.issue([make_ticket(0)])
    worker, served = make_worker(queue, queue_config), Served(PolicyIdentity(0, "ab" * 8), trainer.lease.number)
    assert await worker.take(Stage.TICKETS, served=served) is None
    assert worker.refused
    await trainer.issue([], Announcement(served.identity, "/weights", served.lease))
    assert await worker.take(Stage.TICKETS, served=served) is not None


async def test_a_server_with_older_or_other_weights_gets_nothing(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    announcement = Announcement(PolicyIdentity(3, "ab" * 8), "/weights", trainer.lease.number)
    await trainer.issue([make_ticket(0)], announcement)
    worker, lease = make_worker(queue, queue_config), trainer.lease.number
    assert await worker.take(Stage.TICKETS, served=Served(PolicyIdentity(3, "ab" * 8), lease - 1)) is None
    assert await worker.take(Stage.TICKETS, served=Served(PolicyIdentity(2, "ab" * 8), lease)) is None
    assert await worker.take(Stage.TICKETS, served=Served(PolicyIdentity(3, "cd" * 8), lease)) is None
    assert worker.refused
    assert await worker.take(Stage.TICKETS, served=Served(PolicyIdentity(3, "ab" * 8), lease)) is not None
    assert await queue.announced() == announcement
    assert await queue.client.hgetall(queue.keys.policy) == {
        b"number": b"3",
        b"digest": b"abababababababab",
        b"path": b"/weights",
        b"lease": str(lease).encode(),
        b"canary": b"null",
    }


async def test_a_given_back_entry_is_free_at_once(trainer: TrainerQueue, queue: Queue, queue_config: Config) -> None:
    await issue(trainer, 0)
    first, second = make_worker(queue, queue_config), make_worker(queue, queue_config)
    delivery = await first.take(Stage.TICKETS)
    assert delivery is not None
    await first.give_back(delivery, failed=True, reason="refused")
    again = await second.take(Stage.TICKETS)
    assert again is not None
    assert (again.failures, again.engine_deaths) == (1, 0)


@pytest.mark.parametrize(("reason", "noted"), [("the engine refused it", "the engine refused it"), ("", "poison")])
async def test_failures_up_to_the_limit_make_poison(
    trainer: TrainerQueue, queue: Queue, queue_config: Config, reason: str, noted: str
) -> None:
    await issue(trainer, 0)
    worker = make_worker(queue, queue_config)
    for _ in range(queue_config.staleness.max_deliveries):
        delivery = await worker.take(Stage.TICKETS)
        assert delivery is not None
        await worker.give_back(delivery, failed=True, reason=reason)
    assert await worker.take(Stage.TICKETS) is None
    note = await worker.take(Stage.SCORED)
    assert note is not None
    assert (note.ticket_key, note.reason, note.payload) == ("0", noted, b"")
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


@pytest.mark.parametrize("ends", ["hands over", "buries"])
async def test_a_trained_ticket_stays_committed_whatever_a_second_message_of_it_does(
    trainer: TrainerQueue, queue: Queue, queue_config: Config, ends: str
) -> None:
    await issue(trainer, 0)
    entries: Any = await queue.client.xrange(queue.keys.stream(Stage.TICKETS))
    [(_, fields)] = entries
    await queue.client.xadd(queue.keys.stream(Stage.TICKETS), fields)
    worker = make_worker(queue, queue_config)
    first, second = [await worker.take(Stage.TICKETS) for _ in range(2)]
    assert first is not None
    assert second is not None
    assert await worker.hand_over(first, make_group(make_ticket(0)), Stage.SCORED)
    scored = await worker.take(Stage.SCORED)
    assert scored is not None
    await trainer.commit_step(StepRecord(0, (0,), "f", "d"), {0: scored})
    committed = (await trainer.live())[0]
    if ends == "buries":
        await worker.bury(second, "it does not decode")
    else:
        assert await worker.hand_over(second, make_group(make_ticket(0)), Stage.ROLLOUTS)
    assert (await trainer.live())[0] == committed


async def test_wait_misses_nothing(trainer: TrainerQueue, queue: Queue, queue_config: Config) -> None:
    worker = make_worker(queue, queue_config)
    assert await worker.take(Stage.TICKETS) is None
    await issue(trainer, 0)
    async with asyncio.timeout(ANSWER_SECONDS):
        await worker.wait(timeout_seconds=600)
    assert await worker.take(Stage.TICKETS) is not None
