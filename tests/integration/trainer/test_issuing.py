"""The issuer on a real queue: which tickets it sends, with which version, and what it counts."""

import pytest

from penstock.broker import Queue
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import ActorSection, Config
from penstock.contracts import DropReason
from penstock.contracts.ledger import DropRecord, RunRecord
from penstock.contracts.services import Announcement
from penstock_trainer.rollouts.reconcile import restore_tickets
from tests.integration.trainer.consumer_setup import BATCH_SIZE, NUM_PROMPTS, POLICY, ConsumerSetup

pytestmark = pytest.mark.redis


@pytest.fixture
def config(queue_config: Config) -> Config:
    return queue_config.model_copy(update={"actor": ActorSection(path="m", group_size=2)})


@pytest.fixture
async def trainer_queue(queue: Queue, config: Config) -> TrainerQueue:
    found = TrainerQueue(queue, await acquire_lease(queue, config.model_copy(deep=True)))
    await found.append(RunRecord("d" * 16, NUM_PROMPTS, BATCH_SIZE, 2, 0))
    return found


async def sent(setup: ConsumerSetup) -> list[tuple[int, int, int]]:
    return [(each.number, each.attempt, each.policy_version) for each in await setup.issued_tickets()]


async def test_an_announcement_issues_what_the_credits_allow(trainer_queue: TrainerQueue, config: Config) -> None:
    setup = ConsumerSetup(trainer_queue, config)
    await setup.issuer.announce(Announcement(POLICY, "/weights/1", trainer_queue.lease.number), 0)
    await setup.issuer.refill()  # no credit is left
    assert await sent(setup) == [(number, 0, 1) for number in range(4)]
    announced = await setup.queue.announced()
    assert announced is not None
    assert announced.identity == POLICY
    assert setup.count("tickets", state="issued", reason="") == 4
    assert setup.count("tickets", state="trained", reason="") == 0


async def test_a_ticket_in_no_stream_of_the_queue_is_issued_again_at_the_start(
    trainer_queue: TrainerQueue, config: Config
) -> None:
    earlier = ConsumerSetup(trainer_queue, config)
    await earlier.issue()
    await trainer_queue.drop(DropRecord(1, DropReason.POISON), None)
    keys = earlier.queue.keys
    await earlier.queue.client.hdel(keys.live, "2")
    setup = ConsumerSetup(trainer_queue, config, begun=False)
    ledger = await trainer_queue.ledger()
    await restore_tickets(trainer_queue, setup.book, setup.issuer, ledger, steps=0, version=3, max_staleness=1)
    assert list(setup.book.outstanding) == [0, 2, 3]
    assert (await sent(setup))[-1] == (2, 1, 2)
    assert sorted(await trainer_queue.live()) == [0, 2, 3]
    assert setup.count("tickets", state="reissued", reason="lost") == 1
