"""The trainer's consumer in ready order on a real queue: which groups are stale, and how their tickets end."""

import asyncio
from typing import Any

import pytest

from penstock.broker import Queue
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import ActorSection, Config
from penstock.contracts import PolicyIdentity
from penstock.contracts.ledger import RunRecord, StepRecord
from tests.integration.trainer.consumer_setup import BATCH_SIZE, NUM_PROMPTS, OLD, POLICY, ConsumerSetup

pytestmark = pytest.mark.redis

NEW = PolicyIdentity(2, "c" * 16)
VERSION = 2  # the version in training; with max_staleness 1, tokens of version 0 are too stale
VARIED = (1.0, 0.0)


@pytest.fixture
def config(queue_config: Config) -> Config:
    return queue_config.model_copy(update={"actor": ActorSection(path="m", group_size=2)})


@pytest.fixture
async def trainer_queue(queue: Queue, config: Config) -> TrainerQueue:
    found = TrainerQueue(queue, await acquire_lease(queue, config.model_copy(deep=True)))
    await found.append(RunRecord("d" * 16, NUM_PROMPTS, BATCH_SIZE, 2, 0))
    return found


async def started(setup: ConsumerSetup) -> ConsumerSetup:
    setup.versions.add(NEW)
    await setup.issue()
    return setup


@pytest.fixture
async def dropping(trainer_queue: TrainerQueue, config: Config) -> ConsumerSetup:
    return await started(ConsumerSetup(trainer_queue, config, order="ready"))


@pytest.fixture
async def masking(trainer_queue: TrainerQueue, config: Config) -> ConsumerSetup:
    return await started(ConsumerSetup(trainer_queue, config, order="ready", max_lag=1))


async def numbers_of_next_batch(setup: ConsumerSetup, version: int = VERSION) -> list[int] | None:
    batch = await setup.consumer.next_batch(version)
    return None if batch is None else [arrival.number for arrival in batch]


async def test_a_batch_is_whatever_is_ready(dropping: ConsumerSetup) -> None:
    setup = dropping
    async with setup.consuming():
        await setup.answer(3)
        await setup.until(lambda: setup.arrived == [3])
        assert await numbers_of_next_batch(setup) is None
        await setup.answer(1)
        await setup.until(lambda: setup.arrived == [1, 3])
    assert await numbers_of_next_batch(setup) == [1, 3]
    assert await setup.depth("scored") == 2
    assert list(setup.book.outstanding) == [0, 1, 2, 3]


async def test_a_stale_group_is_dropped_counted_and_replaced(dropping: ConsumerSetup) -> None:
    setup = dropping
    async with setup.consuming():
        await setup.answer(0, VARIED, OLD, NEW)  # one stale token is enough
        await setup.answer(2)
        await setup.until(lambda: setup.arrived == [0, 2])
        assert await numbers_of_next_batch(setup) is None
        assert setup.arrived == [2]
        await setup.answer(4)  # the replacement
        await setup.answer(0)  # late: its ticket has ended
        await setup.until(lambda: setup.count("duplicate_groups") == 1 and setup.worker.num_held == 2)
    assert await numbers_of_next_batch(setup) == [2, 4]
    assert (await setup.issued_tickets())[-1].number == 4
    assert list(setup.book.outstanding) == [1, 2, 3, 4]
    assert (await setup.trainer_queue.ledger()).dropped == {0: "stale"}
    counters = await setup.trainer_queue.counters()
    assert (counters.issued, dict(counters.dropped), counters.outstanding) == (5, {"stale": 1}, 4)
    assert 0 not in await setup.trainer_queue.live()
    assert setup.count("tickets", state="dropped", reason="stale") == 1
    assert setup.count("tickets", state="issued", reason="") == 1  # the setup issued the others
    assert (await setup.depth("scored"), setup.worker.num_held) == (2, 2)


async def test_a_stale_group_gives_its_place_to_one_that_has_arrived(dropping: ConsumerSetup) -> None:
    setup = dropping
    async with setup.consuming():
        await setup.answer(0, VARIED, OLD)
        await setup.answer(1, VARIED, OLD)
        await setup.answer(2)
        await setup.answer(3)
        await setup.until(lambda: len(setup.arrived) == 4)
    assert await numbers_of_next_batch(setup, version=1) == [0, 1]  # not stale for the version before
    assert await numbers_of_next_batch(setup) == [2, 3]
    assert dict((await setup.trainer_queue.counters()).dropped) == {"stale": 2}
    assert list(setup.book.outstanding) == [2, 3, 4, 5]


async def test_a_run_whose_last_tickets_are_stale_ends_instead_of_waiting(dropping: ConsumerSetup) -> None:
    setup = dropping
    setup.book.restore(setup.draws.num_draws, [0, 1], 0)  # as after the last draw
    async with setup.consuming():
        await setup.answer(0, VARIED, OLD)
        await setup.answer(1, VARIED, OLD)
        await setup.until(lambda: setup.arrived == [0, 1])
    setup.changed.clear()
    assert await numbers_of_next_batch(setup) is None
    assert setup.book.finished
    assert setup.changed.is_set()  # the event that the loop waits for


async def test_unknown_weights_are_refused_in_ready_order_too(dropping: ConsumerSetup) -> None:
    setup = dropping
    async with setup.consuming():
        await setup.answer(0, VARIED, PolicyIdentity(1, "f" * 16))
        await setup.until(lambda: setup.count("tickets", state="reissued", reason="version") == 1)
    assert setup.arrived == []
    assert (await setup.issued_tickets())[-1].attempt == 1


async def test_a_stale_group_is_trained_in_part(masking: ConsumerSetup) -> None:
    setup = masking
    async with setup.consuming():
        await setup.answer(0, VARIED, OLD, POLICY, NEW)
        await setup.answer(1, VARIED, NEW)
        await setup.until(lambda: setup.arrived == [0, 1])
    batch = await setup.consumer.next_batch(VERSION)
    assert batch is not None
    assert [arrival.number for arrival in batch] == [0, 1]
    assert [arrival.group.group.completions[0].num_tokens for arrival in batch] == [3, 1]
    assert dict((await setup.trainer_queue.counters()).dropped) == {}
    record = StepRecord(0, (0, 1), "00000000.1.pack", "e" * 16, VERSION, 1)
    await setup.trainer_queue.commit_step(record, {each.number: each.delivery for each in batch})
    assert (await setup.trainer_queue.ledger()).steps == [record]
    assert await setup.depth("scored") == 0


async def test_a_group_of_which_nothing_is_left_stays_in_its_batch(masking: ConsumerSetup) -> None:
    setup = masking
    async with setup.consuming():
        await setup.answer(0, VARIED, OLD, OLD)
        await setup.answer(1, VARIED, OLD, NEW)
        await setup.until(lambda: setup.arrived == [0, 1])
    assert await numbers_of_next_batch(setup) == [0, 1]


async def test_with_dynamic_sampling_a_group_of_which_nothing_is_left_is_dropped(
    trainer_queue: TrainerQueue, config: Config
) -> None:
    setup = await started(ConsumerSetup(trainer_queue, config, order="ready", max_lag=1, dynamic_sampling=True))
    async with setup.consuming():
        await setup.answer(0, VARIED, OLD, OLD)
        await setup.answer(1, VARIED, OLD, NEW)
        await setup.answer(3, VARIED, NEW)
        await setup.until(lambda: setup.arrived == [0, 1, 3])
    assert await numbers_of_next_batch(setup) == [1, 3]
    assert (await trainer_queue.ledger()).dropped == {0: "stale"}
    assert list(setup.book.outstanding) == [1, 2, 3, 4]


async def test_in_ticket_order_a_stale_group_is_issued_again_and_counted(
    trainer_queue: TrainerQueue, config: Config
) -> None:
    setup = await started(ConsumerSetup(trainer_queue, config))
    async with setup.consuming():
        await setup.answer(0, VARIED, OLD, NEW)
        await setup.answer(1)
        await setup.until(lambda: setup.arrived == [0, 1])
        assert await numbers_of_next_batch(setup) is None
        assert setup.count("tickets", state="reissued", reason="stale") == 1
        await setup.answer(0)
        await setup.until(lambda: setup.arrived == [0, 1])
    assert await numbers_of_next_batch(setup) == [0, 1]
    assert dict((await trainer_queue.counters()).dropped) == {}


async def test_no_issue_overtakes_another(dropping: ConsumerSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loop, consumer and releases all issue tickets; the script counts a ticket only if `next` rises: order matters."""
    setup, run = dropping, dropping.queue.run
    delays = iter([0.2])  # the first call must connect

    async def slow_at_first(*arguments: Any) -> Any:
        await asyncio.sleep(next(delays, 0.0))
        return await run(*arguments)

    monkeypatch.setattr(setup.queue, "run", slow_at_first)
    async with asyncio.TaskGroup() as group:
        for number in range(4, 8):
            ticket = setup.draws.ticket(number, attempt=0, policy_version=1)
            group.create_task(setup.trainer_queue.issue([ticket]))
    assert (await setup.trainer_queue.counters()).issued == 8
    assert [each.number for each in await setup.issued_tickets()] == list(range(8))
