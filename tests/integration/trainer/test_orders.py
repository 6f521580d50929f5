"""The trainer's consumer in ready order on a real queue: what a stale group is, and what becomes of its ticket."""

import asyncio
from typing import Any

import pytest

from penstock.broker import Queue
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import ActorSection, Config
from penstock.contracts import PolicyIdentity
from penstock.contracts.ledger import RunRecord, StepRecord
from tests.integration.trainer.consumer_setup import BATCH_SIZE, NUM_PROMPTS, OLD, POLICY, Bench

pytestmark = pytest.mark.redis

NEW = PolicyIdentity(2, "c" * 16)
VERSION = 2  # under training: with max_staleness 1 tokens of version 0 are too old
VARIED = (1.0, 0.0)


@pytest.fixture
def config(queue_config: Config) -> Config:
    return queue_config.model_copy(update={"actor": ActorSection(path="m", group_size=2)})


@pytest.fixture
async def trainer_queue(queue: Queue, config: Config) -> TrainerQueue:
    found = TrainerQueue(queue, await acquire_lease(queue, config.model_copy(deep=True)))
    await found.append(RunRecord("d" * 16, NUM_PROMPTS, BATCH_SIZE, 2, 0))
    return found


async def started(bench: Bench) -> Bench:
    bench.versions.know(NEW)
    await bench.issue()
    return bench


@pytest.fixture
async def dropping(trainer_queue: TrainerQueue, config: Config) -> Bench:
    return await started(Bench(trainer_queue, config, order="ready"))


@pytest.fixture
async def masking(trainer_queue: TrainerQueue, config: Config) -> Bench:
    return await started(Bench(trainer_queue, config, order="ready", max_lag=1))


async def numbers_of_next_batch(bench: Bench, version: int = VERSION) -> list[int] | None:
    batch = await bench.consumer.next_batch(version)
    return None if batch is None else [arrival.number for arrival in batch]


async def test_a_batch_is_whatever_is_ready(dropping: Bench) -> None:
    bench = dropping
    async with bench.consuming():
        await bench.answer(3)
        await bench.until(lambda: bench.arrived == [3])
        assert await numbers_of_next_batch(bench) is None
        await bench.answer(1)
        await bench.until(lambda: bench.arrived == [1, 3])
    assert await numbers_of_next_batch(bench) == [1, 3]
    assert await bench.depth("scored") == 2
    assert list(bench.book.outstanding) == [0, 1, 2, 3]


async def test_a_stale_group_is_dropped_counted_and_replaced(dropping: Bench) -> None:
    bench = dropping
    async with bench.consuming():
        await bench.answer(0, VARIED, OLD, NEW)  # one token is enough
        await bench.answer(2)
        await bench.until(lambda: bench.arrived == [0, 2])
        assert await numbers_of_next_batch(bench) is None
        assert bench.arrived == [2]
        await bench.answer(4)  # the replacement
        await bench.answer(0)  # late: it has ended
        await bench.until(lambda: bench.count("duplicate_groups") == 1 and bench.worker.num_held == 2)
    assert await numbers_of_next_batch(bench) == [2, 4]
    assert (await bench.issued_tickets())[-1].number == 4
    assert list(bench.book.outstanding) == [1, 2, 3, 4]
    assert (await bench.trainer_queue.ledger()).dropped == {0: "stale"}
    counters = await bench.trainer_queue.counters()
    assert (counters.issued, dict(counters.dropped), counters.outstanding) == (5, {"stale": 1}, 4)
    assert 0 not in await bench.trainer_queue.live()
    assert bench.count("tickets", state="dropped", reason="stale") == 1
    assert bench.count("tickets", state="issued", reason="") == 1  # the bench itself has issued the others
    assert (await bench.depth("scored"), bench.worker.num_held) == (2, 2)


async def test_a_stale_group_gives_its_place_to_one_that_has_arrived(dropping: Bench) -> None:
    bench = dropping
    async with bench.consuming():
        await bench.answer(0, VARIED, OLD)
        await bench.answer(1, VARIED, OLD)
        await bench.answer(2)
        await bench.answer(3)
        await bench.until(lambda: len(bench.arrived) == 4)
    assert await numbers_of_next_batch(bench, version=1) == [0, 1]  # young enough for the version before
    assert await numbers_of_next_batch(bench) == [2, 3]
    assert dict((await bench.trainer_queue.counters()).dropped) == {"stale": 2}
    assert list(bench.book.outstanding) == [2, 3, 4, 5]


async def test_a_run_whose_last_tickets_are_stale_ends_instead_of_waiting(dropping: Bench) -> None:
    bench = dropping
    bench.book.restore(bench.draws.num_draws, [0, 1], 0)  # as after the last draw
    async with bench.consuming():
        await bench.answer(0, VARIED, OLD)
        await bench.answer(1, VARIED, OLD)
        await bench.until(lambda: bench.arrived == [0, 1])
    bench.changed.clear()
    assert await numbers_of_next_batch(bench) is None
    assert bench.book.finished
    assert bench.changed.is_set()  # what the loop waits for


async def test_unknown_weights_are_refused_in_ready_order_too(dropping: Bench) -> None:
    bench = dropping
    async with bench.consuming():
        await bench.answer(0, VARIED, PolicyIdentity(1, "f" * 16))
        await bench.until(lambda: bench.count("tickets", state="reissued", reason="version") == 1)
    assert bench.arrived == []
    assert (await bench.issued_tickets())[-1].attempt == 1


async def test_a_stale_group_is_trained_in_part(masking: Bench) -> None:
    bench = masking
    async with bench.consuming():
        await bench.answer(0, VARIED, OLD, POLICY, NEW)
        await bench.answer(1, VARIED, NEW)
        await bench.until(lambda: bench.arrived == [0, 1])
    batch = await bench.consumer.next_batch(VERSION)
    assert batch is not None
    assert [arrival.number for arrival in batch] == [0, 1]
    assert [arrival.group.group.completions[0].num_tokens for arrival in batch] == [3, 1]
    assert dict((await bench.trainer_queue.counters()).dropped) == {}
    record = StepRecord(0, (0, 1), "00000000.1.pack", "e" * 16, VERSION, 1)
    await bench.trainer_queue.commit_step(record, {each.number: each.delivery for each in batch})
    assert (await bench.trainer_queue.ledger()).steps == [record]
    assert await bench.depth("scored") == 0


async def test_a_group_of_which_nothing_is_left_stays_in_its_batch(masking: Bench) -> None:
    bench = masking
    async with bench.consuming():
        await bench.answer(0, VARIED, OLD, OLD)
        await bench.answer(1, VARIED, OLD, NEW)
        await bench.until(lambda: bench.arrived == [0, 1])
    assert await numbers_of_next_batch(bench) == [0, 1]


async def test_with_dynamic_sampling_a_group_of_which_nothing_is_left_is_dropped(
    trainer_queue: TrainerQueue, config: Config
) -> None:
    bench = await started(Bench(trainer_queue, config, order="ready", max_lag=1, dynamic_sampling=True))
    async with bench.consuming():
        await bench.answer(0, VARIED, OLD, OLD)
        await bench.answer(1, VARIED, OLD, NEW)
        await bench.answer(3, VARIED, NEW)
        await bench.until(lambda: bench.arrived == [0, 1, 3])
    assert await numbers_of_next_batch(bench) == [1, 3]
    assert (await trainer_queue.ledger()).dropped == {0: "stale"}
    assert list(bench.book.outstanding) == [1, 2, 3, 4]


async def test_in_ticket_order_a_stale_group_is_issued_again_and_counted(
    trainer_queue: TrainerQueue, config: Config
) -> None:
    bench = await started(Bench(trainer_queue, config))
    async with bench.consuming():
        await bench.answer(0, VARIED, OLD, NEW)
        await bench.answer(1)
        await bench.until(lambda: bench.arrived == [0, 1])
        assert await numbers_of_next_batch(bench) is None
        assert bench.count("tickets", state="reissued", reason="stale") == 1
        await bench.answer(0)
        await bench.until(lambda: bench.arrived == [0, 1])
    assert await numbers_of_next_batch(bench) == [0, 1]
    assert dict((await trainer_queue.counters()).dropped) == {}


async def test_no_issue_overtakes_another(dropping: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loop, consumer and releases issue: the script counts a ticket where `next` rises, so order matters."""
    bench, run = dropping, dropping.queue.run
    delays = iter([0.2])  # a connection that has to be made first

    async def slow_at_first(*arguments: Any) -> Any:
        await asyncio.sleep(next(delays, 0.0))
        return await run(*arguments)

    monkeypatch.setattr(bench.queue, "run", slow_at_first)
    async with asyncio.TaskGroup() as group:
        for number in range(4, 8):
            ticket = bench.draws.ticket(number, attempt=0, policy_version=1)
            group.create_task(bench.trainer_queue.issue([ticket]))
    assert (await bench.trainer_queue.counters()).issued == 8
    assert [each.number for each in await bench.issued_tickets()] == list(range(8))
