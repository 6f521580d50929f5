"""The loop commits a step while its gradient is computed, and changes weights only after that."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from penstock.broker import Queue, Stage
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import read_ledger
from penstock.config import Config
from penstock.contracts import PolicyIdentity, Ticket, decode
from penstock.contracts.ledger import StepRecord
from penstock.contracts.log_ratios import LogRatiosFile, unpack_log_ratios
from penstock.errors import ConfigError, LeaseLostError, NonFiniteError, WeightsError
from penstock.records import RunRecords
from penstock.records.samples import SampleLine
from penstock_trainer.learner.learner import Learner
from penstock_trainer.resume import restore
from penstock_trainer.telemetry.records import EvalResult
from penstock_trainer.weights.files import Format
from penstock_trainer.weights.staging import Staging
from tests.integration.broker.queue_setup import put, stored_scored
from tests.integration.trainer.consumer_setup import scored
from tests.integration.trainer.loop_setup import SECONDS, Life, loop_document, same
from tests.patience import ANSWER_SECONDS

pytestmark = pytest.mark.redis


@pytest.fixture
async def loop(queue: Queue, queue_config: Config, tmp_path: Path) -> AsyncIterator[Life]:
    given = loop_document(queue_config, tmp_path)
    config = Config.model_validate(given)
    lease = await acquire_lease(queue, config)
    lost: list[Exception] = []
    lease.start_renewing(lost.append)
    try:
        yield Life(config, queue, lease)
    finally:
        await asyncio.to_thread(lease.release)


@contextlib.asynccontextmanager
async def held(loop: Life) -> AsyncIterator["asyncio.Task[None]"]:
    """Bring the loop to where step 0 is trained and its weights are being staged. The update of step 1 waits
    for that, if it may begin.
    """
    async with loop.training() as training:
        policy = await loop.announced(0)
        loop.transport.hold()
        await loop.answer(0, policy)
        await loop.watch.until("finished", 1)
        await loop.answer(1, policy)
        if loop.learner.beside:
            await loop.watch.until("gradient", 2)
        yield training


@pytest.mark.parametrize("has_result", [False, True])
async def test_an_evaluation_that_an_earlier_life_has_is_not_repeated(loop: Life, has_result: bool) -> None:
    if has_result:
        loop.status.progress.add_eval(EvalResult(0, 0.5, 0.5, 1, 1, 0, 0, 0, ()))
    async with loop.training():
        await loop.answer(0, await loop.announced(0))
        await loop.announced(1)
        assert loop.evaluation.num_waiting == int(not has_result)
        assert await loop.depth("eval") == int(not has_result)


async def error_of(training: "asyncio.Task[None]") -> BaseException:
    """The first error that ended the loop."""
    async with asyncio.timeout(SECONDS):
        with pytest.raises(BaseExceptionGroup) as raised:
            await training
    error: BaseException = raised.value
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def test_an_update_runs_beside_the_staging_and_changes_weights_after_its_commit(loop: Life) -> None:
    async with held(loop):
        before = loop.state()
        assert await loop.read_ledger() == ["weights 0", "step 0"]
        await loop.watch.until("written", 2)
        assert sorted(path.name[:8] for path in loop.step_files.journal.path.parent.glob("*.pack")) == [
            "0" * 8,
            "00000001",
        ]
        assert await loop.depth("scored") == 2
        assert loop.watch["finished"] == 1
        loop.transport.let_go()
        await loop.watch.until("finished", 2)
        assert (await loop.read_ledger())[:4] == ["weights 0", "step 0", "weights 1", "step 1"]
        assert not same(loop.state(), before)
        await loop.announced(2)
    lines = list(loop.status.progress.steps_after(-1))
    assert [(line["step"], line["version"]) for line in lines] == [(0, 1), (1, 2)]
    assert lines[1]["seconds"]["push_wait"] > 0
    assert lines[1]["seconds"]["stage"] > lines[1]["seconds"]["push_wait"]
    phases = sum(lines[1]["seconds"][phase] for phase in ("wait", "commit", "update", "push_wait"))
    assert 0.5 < phases / lines[1]["seconds"]["step"] <= 1 + 1e-9  # no phase counts twice, and the rest is small


async def test_a_commit_that_fails_ends_the_loop_and_leaves_the_weights(loop: Life, queue: Queue) -> None:
    async with held(loop) as training:
        before = loop.state()
        commit = loop.trainer_queue.commit_step
        committing = asyncio.Event()

        async def lose_the_lease(*arguments: object) -> None:
            await queue.client.set(queue.keys.lease, "99:other")
            committing.set()
            await commit(*arguments)  # type: ignore[arg-type]

        loop.trainer_queue.commit_step = lose_the_lease  # type: ignore[method-assign, assignment]
        loop.transport.let_go()
        assert isinstance(await error_of(training), LeaseLostError)
    assert committing.is_set()
    assert loop.watch["finished"] == 1
    assert same(loop.state(), before)
    assert await loop.read_ledger() == ["weights 0", "step 0", "weights 1"]


async def test_a_staging_that_fails_ends_the_loop_before_the_next_commit(loop: Life) -> None:
    async with held(loop) as training:
        before = loop.state()
        loop.transport.let_go(error="no room")
        error = await error_of(training)
        assert isinstance(error, WeightsError)
        assert str(error) == "no room"
    assert loop.watch["finished"] == 1
    assert same(loop.state(), before)
    assert await loop.read_ledger() == ["weights 0", "step 0"]


async def test_a_version_that_is_known_with_another_digest_is_neither_recorded_nor_trained_on(loop: Life) -> None:
    async with held(loop) as training:
        before = loop.state()
        loop.versions.add(PolicyIdentity(1, "f" * 16))
        loop.transport.let_go()
        error = await error_of(training)
        assert isinstance(error, WeightsError)
        assert str(error).startswith("version 1 is ffffffffffffffff and ")
    assert loop.watch["finished"] == 1
    assert same(loop.state(), before)
    assert await loop.read_ledger() == ["weights 0", "step 0"]


async def test_weights_that_are_not_finite_end_the_loop_and_a_lower_rate_goes_on(
    loop: Life, caplog: pytest.LogCaptureFixture
) -> None:
    """The step is committed, its weights are not recorded: the next life trains it again, as it is configured then."""
    optimizer = loop.config.optimizer.model_copy(update={"lr": 3e38})
    broken = Life(loop.config.model_copy(update={"optimizer": optimizer}), loop.queue, loop.lease)
    async with broken.training() as training:
        await broken.answer(0, await broken.announced(0))
        error = await error_of(training)
    assert isinstance(error, NonFiniteError)
    assert "optimizer.lr" in str(error)
    assert await loop.read_ledger() == ["weights 0", "step 0"]
    async with loop.training():
        await loop.watch.until("announced", 1)
    changed = f"optimizer.lr was 3e+38 and is {loop.config.optimizer.lr!r}: the new value holds from step 1 on"
    assert changed in caplog.messages
    assert await loop.read_ledger() == ["weights 0", "step 0", "weights 1"]
    again = Life(loop.config, loop.queue, loop.lease)
    async with again.training():  # as the second one trained it, not as its record says
        await again.watch.until("announced", 1)
    assert await loop.read_ledger() == ["weights 0", "step 0", "weights 1"]


async def test_a_run_that_ends_in_steps_that_are_not_finite_saves_no_model(loop: Life) -> None:
    """The weights are finite, and no gradient is."""
    document = loop.config.model_dump()
    document["optimizer"]["lr"] = 1e30
    document["run"]["max_steps"] = 3
    broken = Life(Config.model_validate(document), loop.queue, loop.lease)
    async with broken.training() as training:
        await broken.answer(0, await broken.announced(0))
        policy = await broken.announced(1)
        for step in (1, 2):
            await broken.answer(step, policy)
        async with asyncio.timeout(SECONDS):
            with pytest.raises(NonFiniteError, match=r"the last 2 steps .*step 3: .*end with a finite step"):
                await training
    assert [each for each in await loop.read_ledger() if each.startswith("step")] == ["step 0", "step 1", "step 2"]
    again = Life(broken.config, loop.queue, loop.lease)
    async with again.training() as training:
        async with asyncio.timeout(SECONDS):
            with pytest.raises(NonFiniteError, match="the last 2 steps"):
                await training
    assert not (broken.folder / "final").exists()


async def test_an_end_between_gradient_and_commit_changes_nothing(loop: Life) -> None:
    async with held(loop) as training:
        before = loop.state()
        training.cancel()
        with pytest.raises(asyncio.CancelledError):
            await training
    assert (loop.watch["gradient"], loop.watch["finished"]) == (2, 1)
    assert same(loop.state(), before)
    assert await loop.read_ledger() == ["weights 0", "step 0"]
    assert await loop.depth("scored") == 2  # the groups of step 1 are still in the queue
    again = Life(loop.config, loop.queue, loop.lease)
    async with again.training():
        await again.watch.until("announced", 2)  # version 1, with which it begins, and the version of the step
    assert await loop.read_ledger() == ["weights 0", "step 0", "weights 1", "step 1", "weights 2"]
    assert await loop.depth("scored") == 0


async def test_ranks_that_work_together_stage_before_the_next_update_begins(loop: Life) -> None:
    loop.learner.beside = False
    async with held(loop):
        await loop.watch.until("written", 2)
        assert loop.watch["begun"] == 1
        loop.transport.let_go()
        await loop.watch.until("finished", 2)
        assert (await loop.read_ledger())[:4] == ["weights 0", "step 0", "weights 1", "step 1"]


async def test_the_end_waits_for_the_staging_and_a_checkpoint_is_of_recorded_weights(loop: Life) -> None:
    async with held(loop) as training:
        loop.requests.checkpoint = True
        loop.requests.stop.set()
        loop.transport.let_go()
        async with asyncio.timeout(SECONDS):
            await training
    assert loop.status.shown().phase == "ending: all is written"
    assert await loop.read_ledger() == ["weights 0", "step 0", "weights 1", "step 1", "weights 2", "checkpoint 2"]
    meta, _ = loop.checkpoints.read(loop.checkpoints.names()[-1])
    assert (meta.steps, meta.version) == (2, 2)


async def test_what_is_trained_beside_staging_has_the_digests_of_a_training_without(loop: Life, tmp_path: Path) -> None:
    async with loop.training() as training:
        for step in range(4):
            await loop.answer(step, await loop.announced(max(0, step - 1)))
        await loop.announced(4)
        loop.requests.stop.set()
        async with asyncio.timeout(SECONDS):
            await training
    ledger = await loop.trainer_queue.ledger()
    alone = Learner(loop.config)
    told: list[int] = []
    staging = Staging(alone, tmp_path / "again", Format("float32", "nearest"))
    position = await asyncio.to_thread(
        restore,
        alone,
        replace(ledger, checkpoints=[]),
        loop.checkpoints,
        loop.step_files,
        loop.configs,
        staging.digest,
        lambda each: told.append(each.step),
    )
    assert (position.steps, position.version, told) == (4, 4, [0, 1, 2, 3])


async def test_a_queue_that_lost_the_run_is_rebuilt_from_its_folder(
    loop: Life, queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    """Also the tickets that were dropped, of which the folder knows by its journal alone."""
    async with loop.training() as training:
        policy = await loop.announced(0)
        ticket = loop.draws.ticket(0, attempt=0, policy_version=0)
        await put(queue, Stage.SCORED, "0", stored_scored(scored(ticket, (None, None), policy)))
        for number in (1, 2, 3, 4):
            await loop.answer_ticket(number, await loop.announced((number - 1) // 2))
        await loop.announced(2)
        loop.requests.stop.set()
        async with asyncio.timeout(SECONDS):
            await training
    before, expected = await loop.trainer_queue.ledger(), loop.state()
    assert (before.dropped, before.trained) == ({0: "reward_failed"}, {1: 0, 2: 0, 3: 1, 4: 1})
    await queue.delete_run()
    await queue.check_server()
    lease = await acquire_lease(queue, loop.config, above=loop.lease.number)
    again = Life(loop.config, queue, lease)
    try:
        async with again.training():
            await again.watch.until("announced", 1)
            assert same(again.state(), expected)
            assert await again.trainer_queue.ledger() == before
            issued = [(each.number, each.attempt) for each in await tickets(queue)]
            assert issued == [(5, 0), (6, 0), (7, 0), (8, 0)]
            counters = await again.trainer_queue.counters()
            assert (counters.issued, counters.trained, counters.outstanding) == (9, 4, 4)
            assert again.step_files.journal.read() == before
        assert "its ledger is rebuilt from" in caplog.text
    finally:
        await asyncio.to_thread(lease.release)


async def test_samples_of_a_step_are_written_once_and_are_the_same_if_it_is_trained_again(
    loop: Life, queue: Queue
) -> None:
    """The first life is killed after it has written a part of the last step's samples, and not yet the step's line."""
    async with loop.training():
        for step in range(2):
            await loop.answer(step, await loop.announced(step))
        await loop.announced(2)
    samples, steps = loop.folder / "samples.jsonl", loop.folder / "steps.jsonl"
    written = samples.read_bytes()
    lines = [msgspec.json.decode(line, type=SampleLine) for line in written.splitlines()]
    assert [(line.step, line.ticket, line.index) for line in lines] == [
        (step, ticket, index) for step, tickets in ((0, (0, 1)), (1, (2, 3))) for ticket in tickets for index in (0, 1)
    ]
    assert [(line.reward, (line.advantage or 0) > 0) for line in lines[:2]] == [(1.0, True), (0.0, False)]
    assert {(line.version, line.prompt[:1], line.truncated) for line in lines[2:4]} == {(0, "p", False)}
    assert lines[1].rewards == {"exact_match": 0.0}
    [rewards] = {msgspec.json.encode(line["rewards"]) for line in loop.status.progress.steps_after(-1)}
    assert msgspec.json.decode(rewards) == {"exact_match": {"mean": 0.5, "std": 0.5, "num_failed": 0}}
    samples.write_bytes(written[: -len(written) // 8])
    first, _, _ = steps.read_bytes().partition(b"\n")
    steps.write_bytes(first + b"\n")
    again = Life(loop.config, queue, loop.lease)
    async with again.training():
        await again.watch.until("announced", 1)
    assert samples.read_bytes() == written
    assert len(steps.read_bytes().splitlines()) == 2


def log_ratio_files(folder: Path, number: int) -> list[Path]:
    """So many of them, once they are written."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while len(found := sorted(folder.glob("*.log_ratios"))) < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


async def test_a_step_leaves_its_log_ratios_and_the_times_of_the_push_before_it(loop: Life) -> None:
    async with loop.training():
        for step in range(2):
            await loop.answer(step, await loop.announced(step))
        await loop.announced(2)
        found = await asyncio.to_thread(log_ratio_files, loop.folder / "steps", 2)
    records = [each for each in RunRecords(loop.folder).ledger() if isinstance(each, StepRecord)]
    files = [msgspec.msgpack.decode(path.read_bytes(), type=LogRatiosFile) for path in found]
    assert [(each.step, each.digest) for each in files] == [(each.step, each.digest) for each in records]
    assert all(any(unpack_log_ratios(data)) for each in files for row in each.groups for data in row)
    lines = list(RunRecords(loop.folder).steps())
    assert [[each["version"] for each in line["pushes"]] for line in lines] == [[0], [1]]
    assert all(each["started_at"] <= each["ended_at"] for line in lines for each in line["pushes"])


async def test_another_run_in_the_folder_is_refused_before_its_ledger_is_rebuilt(loop: Life, queue: Queue) -> None:
    async with loop.training():
        await loop.announced(0)
    await queue.delete_run()
    await queue.check_server()
    config = loop.config.model_copy(update={"run": loop.config.run.model_copy(update={"seed": 9})})
    lease = await acquire_lease(queue, config, above=loop.lease.number)
    try:
        async with Life(config, queue, lease).training() as training:
            async with asyncio.timeout(SECONDS):
                with pytest.raises(ConfigError, match=r"run\.seed was 0 and is 9"):
                    await training
    finally:
        await asyncio.to_thread(lease.release)
    assert await read_ledger(queue) == []


async def tickets(queue: Queue) -> list[Ticket]:
    entries = await queue.guard(queue.client.xrange(queue.keys.stream(Stage.TICKETS)))
    return [decode(fields[b"p"], Ticket) for _, fields in entries]
