"""Two trainers of one run: the second waits and takes over; then the first can write nothing any more."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from penstock.broker import Delivery, Queue, Stage, Worker, connect
from penstock.broker.lease import Lease, acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import DropReason
from penstock.contracts.ledger import CheckpointRecord, DropRecord, RunRecord, StepRecord, WeightsRecord
from penstock.contracts.services import Announcement
from penstock.errors import LeaseLostError, PenstockError
from tests.integration.broker.queue_setup import POLICY, make_group, make_ticket, passing_keys
from tests.integration.launch.user_commands import (
    END_SECONDS,
    SPREAD,
    UserCommands,
    ended,
    eventually,
    read_only,
    said,
    trained,
)
from tests.patience import ANSWER_SECONDS
from tests.unit.rollout.test_fake_engine import FakeSGLang, serving

pytestmark = pytest.mark.redis

LEASE_LOST_EXIT = 5


def standby(config: Config) -> Config:
    """The same run, for a second trainer that waits as long as it must."""
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"stall_seconds": 0.01}),
            "trainer": config.trainer.model_copy(update={"standby": True}),
        }
    )


def with_heartbeat(config: Config, seconds: float) -> Config:
    staleness = config.staleness.model_copy(update={"heartbeat_seconds": seconds})
    return config.model_copy(update={"staleness": staleness})


async def test_a_standby_waits_past_the_limit_and_takes_over_when_the_lease_is_given_up(
    queue: Queue, queue_config: Config
) -> None:
    config = with_heartbeat(queue_config, 6)  # renewed after two seconds
    first = await acquire_lease(queue, config)
    lost: list[PenstockError] = []
    first.start_renewing(lost.append)
    waiting = asyncio.create_task(acquire_lease(queue, standby(config)))
    before = left = await queue.client.pttl(queue.keys.lease)
    async with asyncio.timeout(ANSWER_SECONDS):
        while left <= before:
            before = left
            await asyncio.sleep(0.05)
            left = await queue.client.pttl(queue.keys.lease)
    assert not waiting.done()
    await asyncio.to_thread(first.release)
    async with asyncio.timeout(ANSWER_SECONDS):
        second = await waiting
    assert second.number == first.number + 1
    assert lost == []


Write = Callable[[TrainerQueue, Delivery], Awaitable[Any]]
WRITES: dict[str, Write] = {
    "issue": lambda trainer, _: trainer.issue([make_ticket(7)]),
    "announce": lambda trainer, _: trainer.issue([], Announcement(POLICY, "/w", trainer.lease.number), resolved=[0]),
    "reissue": lambda trainer, scored: trainer.reissue(make_ticket(0, attempt=1), scored),
    "issue_eval": lambda trainer, _: trainer.issue_eval([make_ticket(7)]),
    "commit": lambda trainer, scored: trainer.commit_step(StepRecord(0, (0,), "f", "d"), {0: scored}),
    "drop": lambda trainer, scored: trainer.drop(DropRecord(0, DropReason.POISON), scored),
    "discard": lambda trainer, scored: trainer.discard(scored),
    "run record": lambda trainer, _: trainer.append(RunRecord("d", 1, 1, 1, 0)),
    "weights record": lambda trainer, _: trainer.append(WeightsRecord(POLICY, 1)),
    "rebuild": lambda trainer, _: trainer.rebuild([RunRecord("d", 1, 1, 1, 0)]),
    "checkpoint record": lambda trainer, _: trainer.append(CheckpointRecord(1, "00000001.1")),
}


async def everything(queue: Queue) -> dict[bytes, bytes | None]:
    """Every key of the run, except those that change by themselves."""
    keys = [key async for key in queue.client.scan_iter(match=queue.keys.pattern)]
    changing = {queue.keys.lease, queue.keys.beats, *passing_keys(queue)}
    return {key: await queue.client.dump(key) for key in keys if key.decode() not in changing}


@pytest.mark.parametrize("kind", WRITES)
async def test_each_kind_of_write_is_refused_after_the_lease_is_lost(
    kind: str, queue: Queue, queue_config: Config
) -> None:
    old = TrainerQueue(queue, await acquire_lease(queue, queue_config))
    await old.issue([make_ticket(0)])
    worker = Worker(queue, "worker", queue_config.staleness)
    ticket = await worker.take(Stage.TICKETS)
    assert ticket is not None
    await worker.hand_over(ticket, make_group(make_ticket(0)), Stage.SCORED)
    scored = await worker.take(Stage.SCORED)
    assert scored is not None
    await asyncio.to_thread(old.lease.release)
    new = TrainerQueue(queue, await acquire_lease(queue, queue_config))
    before = await everything(queue)
    with pytest.raises(LeaseLostError, match=f"held by {new.lease.token}"):
        await WRITES[kind](old, scored)
    assert await everything(queue) == before
    await WRITES[kind](new, scored)
    assert await everything(queue) != before


async def test_a_trainer_that_only_renews_detects_its_loss(queue: Queue, queue_config: Config) -> None:
    lease = await acquire_lease(queue, with_heartbeat(queue_config, 0.5))
    loop, lost = asyncio.get_running_loop(), asyncio.Event()
    reasons: list[PenstockError] = []

    def on_loss(reason: PenstockError) -> None:
        reasons.append(reason)
        loop.call_soon_threadsafe(lost.set)

    await queue.client.set(queue.keys.lease, "99:other")
    lease.start_renewing(on_loss)
    async with asyncio.timeout(ANSWER_SECONDS):
        await lost.wait()
    assert "99:other" in str(reasons[0])
    await asyncio.to_thread(lease.release)
    assert await queue.client.get(queue.keys.lease) == b"99:other"
    assert isinstance(lease, Lease)


@pytest.mark.slow
async def test_a_frozen_trainer_that_wakes_after_a_take_over_ends_and_changes_nothing(
    setup: UserCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.unit.rollout.fake_model.VOCABULARY", 43)  # the tiny model's
    setup.document["trainer"] = {"standby": True}
    setup.document["redis"]["timeout_seconds"] = END_SECONDS  # a call may be frozen while the second trainer starts
    setup.document["total_train_epochs"] = 12
    setup.score_by("spread", SPREAD)
    async with serving(FakeSGLang()) as url:
        setup.start_services(url)
        first = setup.start("penstock_trainer")
        queue = await connect(Config.model_validate(setup.document))
        try:
            await eventually(lambda: trained(queue), 1, first)
            first.send_signal(signal.SIGSTOP)
            second = setup.start("penstock_trainer")
            leases = await lease_number(queue)
            await eventually(lambda: lease_number(queue), leases + 1, second)
            first.send_signal(signal.SIGCONT)
            exit_code = await ended(first)
            assert first.stdout is not None
            output = first.stdout.read()
            assert exit_code == LEASE_LOST_EXIT, output
            assert said(output).startswith("trainer: fenced: the lease is "), output
            assert "Traceback" not in output
            assert await ended(second) == 0, second.stdout and second.stdout.read()
            steps = [record.step for record in (await read_only(queue).ledger()).steps]
            assert steps == list(range(len(steps)))
            counters = await read_only(queue).counters()
            assert counters.issued == 24
            assert counters.outstanding == 0
        finally:
            await queue.close()


async def lease_number(queue: Queue) -> int:
    return int(await queue.client.get(queue.keys.last_lease) or 0)
