"""The messages that tests of the broker move, tickets of two completions and their groups, and the worker that does.

Called by the tests of the broker, of dead letters and of takeovers.
"""

from penstock.broker import Queue, Worker
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import (
    Completion,
    PolicyIdentity,
    RolloutGroup,
    Sampling,
    Ticket,
    VersionSpan,
    pack_float32,
    pack_int32,
)

POLICY = PolicyIdentity(0, "0123456789abcdef")


def make_ticket(number: int, attempt: int = 0) -> Ticket:
    return Ticket(
        purpose="train",
        number=number,
        attempt=attempt,
        policy_version=0,
        prompt="1+1=",
        prompt_ids=pack_int32([1, 2, 3]),
        seeds=(number, number + 1),
        sampling=Sampling(1.0, 4, (2,)),
        answer="2",
        reward="",
        metadata={},
    )


def make_group(ticket: Ticket) -> RolloutGroup:
    completion = Completion(
        pack_int32([5, 2]), b"\x01\x01", pack_float32([-0.5, -0.1]), (VersionSpan(POLICY, 0, 2),), "2", "stop"
    )
    return RolloutGroup(ticket, (completion, completion), "server", 1.0, 2.0)


async def issue(trainer: TrainerQueue, *numbers: int) -> None:
    await trainer.issue([make_ticket(number) for number in numbers])


def make_worker(queue: Queue, config: Config, name: str = "worker") -> Worker:
    return Worker(queue, name, config.staleness)
