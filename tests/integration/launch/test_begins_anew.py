"""What a launch may delete from a queue of the user's if the last one had ended before its first step."""

from penstock.broker import Queue
from penstock.broker.trainer import TrainerQueue
from penstock.contracts import PolicyIdentity, ServiceKind
from penstock.contracts.ledger import StepRecord, WeightsRecord
from penstock.contracts.services import ServiceRecord
from penstock_launch.launch import is_as_good_as_new


async def test_a_run_without_a_step_is_as_good_as_new_unless_services_of_it_are_up(
    trainer: TrainerQueue, queue: Queue
) -> None:
    await trainer.append(WeightsRecord(PolicyIdentity(0, "a"), 0))
    assert await is_as_good_as_new(queue)
    await queue.register(ServiceRecord(ServiceKind.REWARD, "reward-1", "http://127.0.0.1:1", 1, "ready"), 60)
    assert not await is_as_good_as_new(queue)
    await queue.unregister("reward-1")
    assert await is_as_good_as_new(queue)
    await trainer.append(StepRecord(0, (0,), "f", "d"))
    await trainer.append(WeightsRecord(PolicyIdentity(1, "b"), 1))
    assert not await is_as_good_as_new(queue)
