"""Runs whose evaluations decide: the best checkpoint stays, over a resume too, and a run ends early and stays ended."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from safetensors.torch import load_file

from penstock import tickets
from penstock.broker import Queue, Stage
from penstock.broker.lease import acquire_lease
from penstock.config import Config
from penstock.contracts import PolicyIdentity, ScoredGroup, Ticket
from penstock.contracts.ledger import EarlyStopRecord
from penstock.errors import StallError
from penstock.records import RunRecords
from penstock.weights.manifest import identity_digest
from penstock_trainer.offline.export import export_checkpoint
from penstock_trainer.telemetry.records import EvalResult
from tests.integration.broker.queue_setup import put, stored_scored
from tests.integration.trainer.consumer_setup import scored
from tests.integration.trainer.loop_setup import SECONDS, Life, loop_document

pytestmark = pytest.mark.redis

MakeLife = Callable[..., "EvaluatedLife"]


class EvaluatedLife(Life):
    """A life whose evaluation tickets the test answers."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.tickets: list[Ticket] = []
        issue = self.trainer_queue.issue_eval

        async def issue_and_keep(tickets: list[Ticket]) -> None:
            self.tickets += tickets
            await issue(tickets)
            self.watch.saw("evaluation")

        self.trainer_queue.issue_eval = issue_and_keep  # type: ignore[method-assign, assignment]
        report = self.status.progress.add_eval

        def report_and_count(result: EvalResult) -> None:
            report(result)
            self.watch.saw("reported")

        self.status.progress.add_eval = report_and_count  # type: ignore[method-assign]

    async def evaluated(self, version: int, reward: float) -> None:
        """Answer the evaluation of a version, the next one."""
        number = self.watch["answered"] + 1
        await self.watch.until("evaluation", number)
        self.watch.saw("answered")
        ticket, policy = self.tickets[number - 1], self.versions.known[version]
        await put(self.queue, Stage.SCORED, ticket.key, stored_scored(scored(ticket, (reward,), policy)))

    async def has_announced(self, count: int) -> PolicyIdentity:
        """Wait until this life has announced so many versions; the newest one."""
        await self.watch.until("announced", count)
        return self.versions.known[max(self.versions.known)]


@pytest.fixture
async def make_life(queue: Queue, queue_config: Config, tmp_path: Path) -> AsyncIterator[MakeLife]:
    given = loop_document(queue_config, tmp_path)
    given["checkpoint"] |= {"every_steps": 0, "keep": 1}
    lease = await acquire_lease(queue, Config.model_validate(given))
    lost: list[Exception] = []
    lease.start_renewing(lost.append)

    def make(keep_best: bool = False, dynamic_sampling: bool = False, **evaluation: Any) -> EvaluatedLife:
        document = given | {"checkpoint": given["checkpoint"] | {"keep_best": keep_best}}
        document["loss"] = given["loss"] | {"dynamic_sampling": dynamic_sampling}
        document["eval"] = given["eval"] | {"every_steps": 1, **evaluation}
        return EvaluatedLife(Config.model_validate(document), queue, lease)

    try:
        yield make
    finally:
        await asyncio.to_thread(lease.release)


async def ended(training: "asyncio.Task[None]") -> None:
    async with asyncio.timeout(SECONDS):
        await training


async def test_new_weights_wait_for_the_evaluation_of_those_before(make_life: MakeLife) -> None:
    """So that a checkpoint holds exactly what was evaluated."""
    life = make_life(keep_best=True)
    async with life.training() as training:
        policy = await life.has_announced(1)
        await life.answer(0, policy)
        await life.watch.until("finished", 1)
        await life.releases.staged()
        assert await life.read_ledger() == ["weights 0", "step 0", "weights 1"]
        assert life.versions.announced_version == 0
        await life.evaluated(0, 1.0)
        await life.has_announced(2)
        life.requests.stop.set()  # the evaluation of version 1 has no answer
        await ended(training)
    assert [(line["steps"], line["newest_version"]) for line in life.status.progress.evals()] == [(0, 0)]


async def test_a_stop_does_not_wait_for_an_evaluation(make_life: MakeLife) -> None:
    life = make_life(keep_best=True)
    async with life.training() as training:
        await life.answer(0, await life.has_announced(1))
        await life.watch.until("finished", 1)
        life.requests.stop.set()
        await ended(training)
    assert life.versions.announced_version == 1
    assert life.checkpoints.names() == [f"00000001.{life.lease.number}"]


async def test_an_evaluation_that_is_complete_at_a_stop_has_its_line(make_life: MakeLife) -> None:
    """Its results are deleted from the queue as they come, so nobody could make the line later."""
    life = make_life()
    async with life.training() as training:
        await life.has_announced(1)
        receive = life.evaluation.record

        def record_and_stop(scored: ScoredGroup) -> None:
            receive(scored)
            life.requests.stop.set()  # before the loop sees the result

        life.evaluation.record = record_and_stop  # type: ignore[method-assign, assignment]
        await life.evaluated(0, 1.0)
        await ended(training)
    assert [(line["steps"], line["accuracy"]) for line in life.status.progress.evals()] == [(0, 1.0)]


async def test_the_best_checkpoint_stays_over_a_resume_and_is_exported_as_it_was_evaluated(
    make_life: MakeLife, tmp_path: Path
) -> None:
    life = make_life(keep_best=True)
    async with life.training() as training:
        for version, reward in ((0, 1.0), (1, 0.25), (2, 1.0), (3, 0.5)):
            policy = await life.has_announced(version + 1)
            await life.evaluated(version, reward)
            if version < 3:
                await life.answer(version, policy)
        await life.watch.until("reported", 4)
        life.requests.stop.set()
        await ended(training)
    number = life.lease.number
    assert life.checkpoints.names() == [f"00000002.{number}", f"00000003.{number}"]
    later = make_life(keep_best=True)
    async with later.training() as training:
        policy = await later.has_announced(1)
        assert later.tickets == [], "it was evaluated after three steps"
        await later.answer(3, policy)
        await later.has_announced(2)
        await later.evaluated(4, 0.75)
        await later.watch.until("reported", 1)
        later.requests.stop.set()
        await ended(training)
    assert later.checkpoints.names() == [f"00000002.{number}", f"00000004.{number}"]
    assert export_checkpoint(later.config, "best", tmp_path / "out").startswith(f"00000002.{number}, the best")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    digests = {name: xxhash.xxh3_64_hexdigest(each.numpy().tobytes()) for name, each in tensors.items()}
    assert identity_digest(digests) == life.versions.known[2].digest


async def test_an_evaluation_that_a_kill_has_lost_is_made_again_with_its_checkpoint(make_life: MakeLife) -> None:
    """If the life after it begins with the same weights; else its checkpoint is no candidate."""
    life = make_life(keep_best=True)
    async with life.training():
        await life.answer(0, await life.has_announced(1))
        await life.evaluated(0, 0.0)
        await life.watch.until("reported", 1)
        await life.has_announced(2)
    later = make_life(keep_best=True)
    async with later.training() as training:
        await later.has_announced(1)
        await later.evaluated(1, 1.0)
        await later.watch.until("reported", 1)
        later.requests.stop.set()
        await ended(training)
    assert [int(name.split(".")[0]) for name in later.checkpoints.names()] == [1]
    assert [(line["steps"], line["accuracy"]) for line in later.status.progress.evals()] == [(0, 0.0), (1, 1.0)]


async def test_a_run_ends_early_with_its_final_model_and_is_not_trained_on(make_life: MakeLife) -> None:
    life = make_life(patience=1)
    async with life.training() as training:
        policy = await life.has_announced(1)
        await life.evaluated(0, 1.0)
        await life.answer(0, policy)
        await life.has_announced(2)
        await life.evaluated(1, 0.0)
        await ended(training)
    record = EarlyStopRecord(1, "main", "accuracy", 1.0, 0, 1, 0.0)
    assert (await life.trainer_queue.ledger()).early_stop == record
    assert (life.folder / "final" / "model.safetensors").is_file()
    figures = RunRecords(life.folder).figures()
    assert (figures["steps"], figures["stopped_early"]["best_steps"]) == (1, 0)
    later = make_life(patience=1)
    async with later.training() as training:
        await ended(training)
    assert [each for each in await life.read_ledger() if each.startswith("step")] == ["step 0"]
    more = make_life(patience=2)
    async with more.training() as training:
        await more.answer(1, await more.has_announced(1))
        await more.has_announced(2)
        more.requests.stop.set()
        await ended(training)
    assert [each for each in await life.read_ledger() if each.startswith("step")] == ["step 0", "step 1"]
    assert RunRecords(life.folder).figures()["stopped_early"] is None


@pytest.mark.parametrize("dynamic_sampling", [False, True])
async def test_a_run_that_has_solved_its_task_is_finished_and_not_trained_on(
    make_life: MakeLife, dynamic_sampling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tickets, "BATCHES_WITHOUT_GRADIENT", 2)
    life = make_life(dynamic_sampling=dynamic_sampling, every_steps=100)
    async with life.training() as training:
        await life.answer(0, await life.has_announced(1))
        await life.evaluated(0, 0.5)
        policy = await life.has_announced(2)
        for step in (1, 2):
            await life.answer(step, policy, (1.0, 1.0))
        await life.evaluated(1, 1.0)
        await ended(training)
    steps = life.history.num_steps
    assert steps == 1 if dynamic_sampling else steps in (1, 2, 3)
    record = EarlyStopRecord(steps, metric="reward", best=1.0, best_steps=steps, solved_tickets=4, success=1.0)
    assert (await life.trainer_queue.ledger()).early_stop == record
    assert (life.folder / "final" / "model.safetensors").is_file()
    assert life.checkpoints.names() == [f"0000000{steps}.{life.lease.number}"]
    figures = RunRecords(life.folder).figures()
    assert (figures["steps"], figures["stopped_early"]["solved_tickets"]) == (steps, 4)
    assert (figures["heldout_steps_end"], figures["heldout_accuracy_end"]) == (steps, 1.0)
    ledger = await life.read_ledger()
    later = make_life(dynamic_sampling=dynamic_sampling, every_steps=100)
    async with later.training() as training:
        await ended(training)
    assert later.tickets == [], "it has its last evaluation"
    assert await life.read_ledger() == ledger


async def test_a_reward_that_is_always_the_same_is_a_failure_however_high_it_is(
    make_life: MakeLife, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tickets, "BATCHES_WITHOUT_GRADIENT", 2)
    life = make_life()
    async with life.training() as training:
        policy = await life.has_announced(1)
        for step in (0, 1):
            await life.answer(step, policy, (1.0, 1.0))
        with pytest.raises(ExceptionGroup) as raised:
            await ended(training)
    assert raised.group_contains(StallError, match="all rewards were equal")
    assert (await life.trainer_queue.ledger()).early_stop is None
