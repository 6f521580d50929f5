"""A ledger whose oldest records are in the archive: the run goes on, and all that was recorded is still proved."""

import asyncio
import shutil
from pathlib import Path

import pytest

from penstock.broker import Queue
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import first_record, read_ledger
from penstock.config import Config
from penstock.contracts.ledger import ArchivedRecord, StepRecord
from penstock.records.run import RunRecords
from tests.integration.trainer.consumer_setup import BATCH_SIZE
from tests.integration.trainer.loop_setup import SECONDS, Life, loop_document, same

pytestmark = pytest.mark.redis

NUM_STEPS = 9


@pytest.fixture
def config(queue_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A checkpoint after every second step, of which one is kept."""
    monkeypatch.setattr("penstock_trainer.checkpoints.history.KEPT_STEPS", 2)
    given = loop_document(queue_config, tmp_path)
    given["data"]["eval"] = None
    given["checkpoint"] |= {"every_steps": 2, "keep": 1}
    return Config.model_validate(given)


async def life(config: Config, queue: Queue, above: int = 0) -> Life:
    return Life(config, queue, await acquire_lease(queue, config, above=above))


async def train(one: Life, start: int, end: int) -> None:
    """Train the steps of a range, and end in order."""
    async with one.training() as training:
        for step in range(start, end):
            version = max(start, step - 1)
            await one.watch.until("announced", version - start + 1)
            await one.answer(step, one.versions.known[version])
        await one.watch.until("announced", end - start + 1)
        one.requests.stop.set()
        async with asyncio.timeout(SECONDS):
            await training
    await asyncio.to_thread(one.lease.release)


async def test_a_run_goes_on_from_a_ledger_that_has_given_records_away(
    config: Config, queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    first = await life(config, queue)
    await train(first, 0, NUM_STEPS)
    begin, *rest = await read_ledger(queue)
    assert isinstance(begin, ArchivedRecord)
    assert begin.ended == ((0, begin.num_steps * BATCH_SIZE),)
    steps = [each.step for each in rest if isinstance(each, StepRecord)]
    assert steps == list(range(begin.num_steps, NUM_STEPS))
    assert len(steps) < 2 * 2 + 2  # KEPT_STEPS twice, and a checkpoint's distance

    journal = first.step_files.journal
    history = journal.history()
    assert [each.step for each in history.steps] == list(range(NUM_STEPS))
    assert sorted(history.weights) == list(range(NUM_STEPS + 1))
    assert sorted(history.trained) == list(range(NUM_STEPS * BATCH_SIZE))
    assert RunRecords(first.folder).figures()["tickets"]["trained"] == NUM_STEPS * BATCH_SIZE

    second = await life(config, queue, first.lease.number)
    async with second.training():
        await second.watch.until("announced", 1)
        assert same(second.state(), first.state())
        assert second.book.num_steps == NUM_STEPS
        assert list(second.book.outstanding) == [
            NUM_STEPS * BATCH_SIZE + n for n in range(len(second.book.outstanding))
        ]
        assert journal.history() == history
    await asyncio.to_thread(second.lease.release)

    await queue.delete_run()
    await queue.check_server()
    third = await life(config, queue, second.lease.number)
    async with third.training():
        await third.watch.until("announced", 1)
        assert same(third.state(), first.state())
        counters = await third.trainer_queue.counters()
        assert counters.trained == NUM_STEPS * BATCH_SIZE
        assert await first_record(queue) == begin
        assert journal.history() == history
    assert f"with {NUM_STEPS} steps" in caplog.text
    await asyncio.to_thread(third.lease.release)


async def test_without_a_checkpoint_the_archive_is_trained_again(config: Config, queue: Queue) -> None:
    """The digests of all steps are compared, as those of the archive say."""
    first = await life(config, queue)
    await train(first, 0, NUM_STEPS)
    assert isinstance(await first_record(queue), ArchivedRecord)
    shutil.rmtree(first.folder / "checkpoints")
    second = await life(config, queue, first.lease.number)
    async with second.training():
        await second.watch.until("announced", 1)
        assert same(second.state(), first.state())
        assert second.watch["announced"] == 1
        assert second.book.num_steps == NUM_STEPS
    await asyncio.to_thread(second.lease.release)
