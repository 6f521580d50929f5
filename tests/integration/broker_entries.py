"""What lies in a run's streams and keys, and how a test makes it look older, saves it and loses it.

Called by `broker_machine` and its rules.
"""

from dataclasses import dataclass
from typing import Any

from penstock.broker import Delivery, Queue, Stage
from penstock.broker.keys import GROUP


@dataclass(frozen=True)
class Entry:
    """One message in a stream."""

    stage: Stage
    entry_id: str
    fields: dict[bytes, bytes]

    @property
    def ticket(self) -> int:
        return int(self.fields[b"t"])

    @property
    def place(self) -> str:
        return f"{self.stage}|{self.entry_id}|{self.fields[b'a'].decode()}"


WORK = (Stage.TICKETS, Stage.ROLLOUTS, Stage.SCORED)


async def entries_of(queue: Queue) -> list[Entry]:
    """Everything in the streams of work."""
    async with queue.client.pipeline(transaction=False) as pipeline:
        for stage in WORK:
            pipeline.xrange(queue.keys.stream(stage))
        found: list[Any] = await pipeline.execute()
    return [
        Entry(stage, entry_id.decode(), fields)
        for stage, entries in zip(WORK, found, strict=True)
        for entry_id, fields in entries
    ]


async def holder_of(queue: Queue, delivery: Delivery) -> str | None:
    """The consumer that an entry is pending for."""
    stream, entry = queue.keys.stream(delivery.stage), delivery.entry_id
    pending: Any = await queue.client.xpending_range(stream, GROUP, min=entry, max=entry, count=1)
    return pending[0]["consumer"].decode() if pending else None


async def age(queue: Queue, delivery: Delivery, milliseconds: int) -> None:
    """Make an entry look as if its holder had not renewed it for so long."""
    if (holder := await holder_of(queue, delivery)) is not None:
        stream = queue.keys.stream(delivery.stage)
        await queue.client.xclaim(
            stream, GROUP, holder, min_idle_time=0, message_ids=[delivery.entry_id], idle=milliseconds, justid=True
        )


async def age_all(queue: Queue, milliseconds: int) -> None:
    """Make every entry that somebody holds look so."""
    for stage in WORK:
        stream = queue.keys.stream(stage)
        pending: Any = await queue.client.xpending_range(stream, GROUP, min="-", max="+", count=1000)
        for each in pending:
            holder, entry = each["consumer"].decode(), each["message_id"]
            await queue.client.xclaim(stream, GROUP, holder, 0, [entry], idle=milliseconds, justid=True)


async def copy_keys(queue: Queue) -> dict[bytes, bytes]:
    """All of a run's keys as the server would write them to its disk."""
    keys = [key async for key in queue.client.scan_iter(match=queue.keys.pattern, count=500)]
    async with queue.client.pipeline(transaction=True) as pipeline:
        for key in keys:
            pipeline.dump(key)
        dumped = await pipeline.execute()
    return {key: data for key, data in zip(keys, dumped, strict=True) if data is not None}


async def put_back_keys(queue: Queue, copy: dict[bytes, bytes]) -> None:
    """The server lost everything that was written after `copy` was made."""
    await queue.delete_run()
    async with queue.client.pipeline(transaction=True) as pipeline:
        for key, data in copy.items():
            pipeline.restore(key, 0, data)
        await pipeline.execute()
