"""The trainer's side of the queue: commits, issued tickets, the lease and the end of the ledger, on a real server."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from penstock.broker import Queue, Stage
from penstock.broker.lease import Lease, acquire_lease
from penstock.broker.trainer import REBUILD_LEDGER, TrainerQueue, first_record, read_ledger
from penstock.config import Config
from penstock.contracts import DropReason
from penstock.contracts.ledger import (
    ArchivedRecord,
    DropRecord,
    Record,
    RunRecord,
    StepRecord,
    WeightsRecord,
    archived,
    encode_record,
)
from penstock.contracts.services import Announcement, Turn
from penstock.errors import LeaseLostError, LostWritesError, PenstockError, StallError
from penstock.run_home import RunHome
from tests.integration.broker.queue_setup import POLICY, expire_lease, issue, make_group, make_ticket, make_worker


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
        entries[number] = scored
    record = StepRecord(0, (0,), "00000000.1.pack", "ff")
    await trainer.commit_step(record, {0: entries[0]})
    await trainer.commit_step(record, {0: entries[0]})
    await trainer.drop(DropRecord(1, DropReason.POISON), entries[1])
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
    await expire_lease(queue)
    successor = await acquire_lease(queue, queue_config)
    assert successor.number == trainer.lease.number + 1
    for call in (
        issue(trainer, 1),
        trainer.append(RunRecord("d", 1, 1, 1, 0)),
        trainer.commit_step(StepRecord(0, (0,), "f", "d"), {}),
        trainer.drop(DropRecord(0, DropReason.POISON), None),
    ):
        with pytest.raises(LeaseLostError):
            await call
    assert (await trainer.counters()).issued == 1


async def test_an_expired_lease_that_nobody_took_is_held_again(trainer: TrainerQueue, queue: Queue) -> None:
    assert 0 < await queue.client.pttl(queue.keys.lease) <= 3600_000
    await expire_lease(queue)
    await issue(trainer, 0)
    assert await queue.client.get(queue.keys.lease) == trainer.lease.token.encode()


async def test_an_expired_lease_that_another_had_is_not_held_again(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await expire_lease(queue)
    successor = await acquire_lease(queue, queue_config)
    await asyncio.to_thread(successor.release)
    with pytest.raises(LostWritesError, match="held by nobody"):
        await issue(trainer, 0)


async def test_the_trainers_turn_ends_with_its_end_or_its_lease(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    assert await queue.turn() is None
    number = trainer.lease.number
    for turn in (1, 2):
        assert await trainer.take_turn(turn) == await queue.turn() == Turn(number, turn)
    await trainer.end_turn()
    assert await queue.turn() is None
    await trainer.take_turn(3)
    await expire_lease(queue)
    assert await queue.turn() is None  # the trainer has died
    await trainer.lease.renew(queue)
    assert await queue.turn() == Turn(number, 3)
    await expire_lease(queue)
    successor = TrainerQueue(queue, await acquire_lease(queue, queue_config))
    assert await queue.turn() is None
    assert await successor.take_turn(1) == await queue.turn() == Turn(number + 1, 1)
    for call in (trainer.take_turn(4), trainer.end_turn()):
        with pytest.raises(LeaseLostError):
            await call
    assert await queue.turn() == Turn(number + 1, 1)


async def test_a_lease_that_is_abandoned_expires_by_itself(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    """Engines that share a GPU with the trainer wake after that, when its process is gone."""
    trainer.lease.start_renewing(lambda error: None)
    await asyncio.to_thread(trainer.lease.abandon)
    assert await queue.client.get(queue.keys.lease) == trainer.lease.token.encode()
    assert await queue.client.pttl(queue.keys.lease) > 0


async def test_a_lease_number_that_the_queue_forgot_is_not_given_out_again(
    queue: Queue, queue_config: Config, tmp_path: Path
) -> None:
    """Servers that have followed it would take no weights of a lower one, and no tickets for them."""
    home = RunHome(tmp_path, "trainer")
    assert (await acquire_lease(queue, queue_config, home, above=7)).number == 8
    await queue.delete_run()
    assert (await acquire_lease(queue, queue_config, home)).number == 9
    await queue.delete_run()
    assert (await acquire_lease(queue, queue_config, home, above=3)).number == 10


async def test_a_ledger_that_lost_its_end_is_not_continued(trainer: TrainerQueue, queue: Queue) -> None:
    await trainer.append(RunRecord("d", 1, 1, 2, 0))
    await trainer.ledger()
    await trainer.commit_step(StepRecord(0, (0,), "f", "d"), {})
    assert await trainer.ends_as_written()
    await queue.client.xtrim(queue.keys.ledger, maxlen=0, approximate=False)
    assert not await trainer.ends_as_written()
    with pytest.raises(LostWritesError, match="ledger ends with"):
        await trainer.commit_step(StepRecord(1, (1,), "f", "d"), {})


async def test_a_reader_of_the_ledger_does_not_change_what_it_must_end_with(
    trainer: TrainerQueue, queue: Queue
) -> None:
    """The checkpoint writer reads it while the loop appends to it."""
    await trainer.append(RunRecord("d", 1, 1, 2, 0))
    await trainer.ledger()
    for step in range(20):
        await asyncio.gather(trainer.ledger(), trainer.commit_step(StepRecord(step, (step,), "f", "d"), {}))
        assert await trainer.ends_as_written()
    await queue.client.xtrim(queue.keys.ledger, maxlen=0, approximate=False)
    await trainer.ledger()
    assert not await trainer.ends_as_written()


async def test_a_held_lease_is_waited_for_and_then_named(queue: Queue, queue_config: Config) -> None:
    lease = await acquire_lease(queue, queue_config)
    lost: list[PenstockError] = []
    lease.start_renewing(lost.append)
    try:
        short = queue_config.model_copy(update={"run": queue_config.run.model_copy(update={"stall_seconds": 1.0})})
        with pytest.raises(StallError, match=r"run\.stall_seconds"):
            await acquire_lease(queue, short)
    finally:
        await asyncio.to_thread(lease.release)
    assert lost == []
    assert isinstance(await acquire_lease(queue, queue_config), Lease)


LOST: list[Record] = [
    RunRecord("d", 10, 2, 2, 0),
    StepRecord(0, (0, 2), "00000000.1.pack", "ff"),
    DropRecord(1, DropReason.POISON),
    WeightsRecord(POLICY, 1),
    StepRecord(1, (3, 5), "00000001.1.pack", "ee"),
]


async def test_a_lost_ledger_is_written_again_with_its_counters_and_goes_on(
    trainer: TrainerQueue, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.broker.trainer.WRITE_COUNT", 2)
    state = await trainer.rebuild(LOST)
    assert await read_ledger(queue) == LOST
    assert (state.trained, state.dropped) == ({0: 0, 2: 0, 3: 1, 5: 1}, {1: "poison"})
    counters = await trainer.counters()
    assert (counters.next_number, counters.issued, counters.trained) == (6, 6, 4)
    assert (dict(counters.dropped), counters.outstanding) == ({"poison": 1}, 1)
    await trainer.append(WeightsRecord(POLICY, 2))  # it follows the entry that ends the rebuilt ledger
    assert await trainer.ends_as_written()
    assert not await queue.client.exists(queue.keys.rebuilt)


async def test_a_ledger_that_is_there_is_not_written_over(trainer: TrainerQueue, queue: Queue) -> None:
    await trainer.rebuild(LOST)
    await trainer.append(WeightsRecord(POLICY, 2))
    before = await trainer.counters()
    await trainer.rebuild(LOST[:2])
    assert await read_ledger(queue) == [*LOST, WeightsRecord(POLICY, 2)]
    assert await trainer.counters() == before


async def test_a_rebuild_that_stopped_leaves_no_ledger_and_a_repeated_call_adds_nothing_twice(
    trainer: TrainerQueue, queue: Queue
) -> None:
    keys = queue.keys
    records = [encode_record(each) for each in LOST]

    async def rebuild(position: int, given: list[bytes]) -> None:
        call = REBUILD_LEDGER(
            lease=keys.lease, rebuilt=keys.rebuilt, token=trainer.lease.token, position=position, records=given
        )
        await queue.run(call)

    await rebuild(0, [b"of an earlier life"] * 7)
    for _ in range(2):
        await rebuild(0, records[:2])
    for _ in range(2):
        await rebuild(2, records[2:])
    assert await queue.client.xlen(keys.rebuilt) == len(LOST)
    with pytest.raises(LostWritesError, match="the rebuilt ledger has 5 records"):
        await rebuild(6, records)
    assert await read_ledger(queue) == []
    assert (await trainer.counters()).issued == 0
    await trainer.rebuild(LOST[:3])
    assert await read_ledger(queue) == LOST[:3]


async def test_the_first_record_is_that_of_the_run(trainer: TrainerQueue, queue: Queue) -> None:
    assert await first_record(queue) is None
    await trainer.rebuild(LOST)
    assert await first_record(queue) == LOST[0]


async def test_the_oldest_records_are_archived_once_and_the_ledger_goes_on(trainer: TrainerQueue, queue: Queue) -> None:
    whole = await trainer.rebuild(LOST)
    archive: list[Record] = []

    async def write(records: Sequence[Record]) -> int:
        archive.extend(records)
        return len(archive)

    await trainer.archive(1, write, exists=())
    assert archive == LOST[:4]
    begin, *rest = await read_ledger(queue)
    assert rest == LOST[4:]
    assert isinstance(begin, ArchivedRecord)
    assert begin == ArchivedRecord(LOST[0], 1, 4, ((0, 3),), 2, {DropReason.POISON: 1}, ())  # type: ignore[arg-type]
    assert await first_record(queue) == begin
    state = await trainer.ledger()
    assert (state.ended, state.num_trained, state.num_steps) == (whole.ended, whole.num_trained, whole.num_steps)
    await trainer.append(WeightsRecord(POLICY, 2))
    await trainer.commit_step(StepRecord(2, (6, 7), "00000002.1.pack", "dd"), {})
    await trainer.archive(2, write, exists=())
    assert archive == [*LOST, WeightsRecord(POLICY, 2)]
    assert len(await read_ledger(queue)) == 2
    await queue.client.xadd(queue.keys.ledger, {"r": encode_record(LOST[4])})  # not by this trainer
    with pytest.raises(LostWritesError, match="the ledger ends with"):
        await trainer.archive(1, write, exists=())


async def test_a_lost_ledger_that_was_archived_is_written_again_with_its_counters(
    trainer: TrainerQueue, queue: Queue
) -> None:
    begin = archived(LOST[:4], 4, exists=())
    state = await trainer.rebuild([begin, *LOST[4:]])
    assert await read_ledger(queue) == [begin, *LOST[4:]]
    counters = await trainer.counters()
    assert (counters.next_number, counters.issued, counters.trained) == (6, 6, 4)
    assert (dict(counters.dropped), counters.outstanding) == ({"poison": 1}, 1)
    assert state.not_ended(6) == [4]
