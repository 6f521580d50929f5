"""Messages for the tests of the broker (tickets of two completions and their groups), and a worker that moves them."""

import asyncio
import uuid
from typing import Any

from penstock.broker import Delivery, Queue, Stage, Worker
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import (
    Completion,
    PolicyIdentity,
    RolloutGroup,
    Sampling,
    Score,
    ScoredGroup,
    Ticket,
    VersionSpan,
    decode,
    encode,
    pack_float32,
    pack_int32,
)
from penstock.contracts.stored_groups import Part, RolloutHeader, ScoredHeader, Stored, group_of, stored
from tests.patience import ANSWER_SECONDS

POLICY = PolicyIdentity(0, "0123456789abcdef")


async def written(queue: Queue) -> None:
    """Wait until the server's file has what the server acknowledged.

    With `appendfsync everysec` a server may write up to two seconds later if the disk is busy, and a kill loses that.
    """
    async with asyncio.timeout(ANSWER_SECONDS):
        while (await queue.client.info("persistence"))["aof_buffer_length"]:  # noqa: ASYNC110  # no event says so
            await asyncio.sleep(0.01)


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


def make_scored(ticket: Ticket) -> ScoredHeader:
    """The header of the group after a reward service has scored it."""
    return ScoredHeader(decode(stored(make_group(ticket)).header, RolloutHeader), (Score(1.0), Score(0.0)))


def stored_scored(scored: ScoredGroup) -> Stored:
    """A scored group as the queue stores it while its texts are still there."""
    form = stored(scored.group)
    header = ScoredHeader(decode(form.header, RolloutHeader), scored.scores, scored.functions)
    return Stored(encode(header), form.parts)


async def put(queue: Queue, stage: Stage, key: str, form: Stored) -> str:
    """Add a message to a stream without any script, and wake its readers; returns the name of its parts."""
    name = uuid.uuid4().hex
    for part, data in form.parts.items():
        await queue.client.set(queue.keys.part(name, part), data)
    fields: Any = {"t": key, "a": "0", "p": form.header, "n": name}
    await queue.guard(queue.client.xadd(queue.keys.stream(stage), fields))
    for consumer, _ in await queue.guard(queue.client.zpopmin(queue.keys.waiting(stage))):
        await queue.guard(queue.client.rpush(queue.keys.woken(consumer.decode()), "1"))
    return name


async def read_group(worker: Worker, delivery: Delivery) -> RolloutGroup:
    """The full group of an entry in `rollouts`."""
    [parts] = await worker.read([delivery], *Part)
    return group_of(decode(delivery.payload, RolloutHeader), parts)


async def part_keys(queue: Queue) -> dict[str, int]:
    """The keys of all parts, with the milliseconds until each expires; -1: never."""
    keys = [key.decode() async for key in queue.client.scan_iter(match=queue.keys.name("part:*"), count=500)]
    return {key: await queue.client.pttl(key) for key in keys}


async def issue(trainer: TrainerQueue, *numbers: int) -> None:
    await trainer.issue([make_ticket(number) for number in numbers])


async def expire_lease(queue: Queue) -> None:
    """Let the trainer's lease expire."""
    assert await queue.client.delete(queue.keys.lease) == 1


async def expire_beat(queue: Queue, worker: Worker) -> None:
    """Let the worker's heartbeat expire."""
    assert await queue.guard(queue.client.hset(queue.keys.beats, worker.name, "1")) == 0
    await look_again(queue)


def passing_keys(queue: Queue) -> set[str]:
    """The keys that only time deletes."""
    return {queue.keys.tidied, *map(queue.keys.looked, Stage)}


async def look_again(queue: Queue) -> None:
    """Let the time pass until the next `take` looks for entries whose holder is dead or has not renewed them."""
    await queue.delete([queue.keys.looked(stage) for stage in Stage])


async def beats_until(queue: Queue, worker: Worker) -> int:
    """The Unix time in milliseconds until which a worker counts as alive."""
    return int(await queue.guard(queue.client.hget(queue.keys.beats, worker.name)) or 0)


def make_worker(queue: Queue, config: Config, name: str = "worker") -> Worker:
    return Worker(queue, name, config.staleness)
