"""The entries in a run's streams and keys, and how a test makes them older, saves them and loses them."""

import uuid
from dataclasses import dataclass
from typing import Any

from penstock.broker import Delivery, Queue, Stage
from penstock.broker.keys import GROUP
from penstock.broker.worker import PART_TTL_MS
from penstock.contracts import decode
from penstock.contracts.stored_groups import Part, RolloutHeader, ScoredHeader
from tests.integration.broker.queue_setup import look_again, part_keys, passing_keys


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

    @property
    def parts(self) -> str:
        """The name of its parts; empty if it has none."""
        return self.fields.get(b"n", b"").decode()

    @property
    def number(self) -> float:
        """The value that its group has instead of a start time."""
        if self.stage is Stage.ROLLOUTS:
            return decode(self.fields[b"p"], RolloutHeader).started_at
        return decode(self.fields[b"p"], ScoredHeader).group.started_at


WORK = (Stage.TICKETS, Stage.ROLLOUTS, Stage.SCORED)


async def entries_of(queue: Queue) -> list[Entry]:
    """All entries in the streams of work."""
    async with queue.client.pipeline(transaction=False) as pipeline:
        for stage in WORK:
            pipeline.xrange(queue.keys.stream(stage))
        found: list[Any] = await pipeline.execute()
    return [
        Entry(stage, entry_id.decode(), fields)
        for stage, entries in zip(WORK, found, strict=True)
        for entry_id, fields in entries
    ]


async def dead_entries(queue: Queue) -> list[Entry]:
    """The dead letters, as the entries that they were in their streams."""
    found: Any = await queue.client.xrange(queue.keys.dead)
    return [Entry(Stage(fields[b"s"].decode()), entry_id.decode(), fields) for entry_id, fields in found]


async def copy_entry(queue: Queue, entry: Entry) -> None:
    """Add a second message with the same content; another worker would have written its own parts."""
    fields: Any = dict(entry.fields)
    if entry.parts:
        fields[b"n"] = uuid.uuid4().hex
        for part in Part:
            await queue.client.copy(queue.keys.part(entry.parts, part), queue.keys.part(fields[b"n"], part))
    await queue.client.xadd(queue.keys.stream(entry.stage), fields)


async def parts_without_an_entry_expire(queue: Queue) -> None:
    """Let time pass."""
    for key, milliseconds in (await part_keys(queue)).items():
        if milliseconds >= 0:
            await queue.client.delete(key)


async def holder_of(queue: Queue, delivery: Delivery) -> str | None:
    """The consumer for which an entry is pending."""
    stream, entry = queue.keys.stream(delivery.stage), delivery.entry_id
    pending: Any = await queue.client.xpending_range(stream, GROUP, min=entry, max=entry, count=1)
    return pending[0]["consumer"].decode() if pending else None


async def age(queue: Queue, delivery: Delivery, milliseconds: int) -> None:
    """Make an entry look as if its holder had not renewed it for this long."""
    if (holder := await holder_of(queue, delivery)) is not None:
        stream = queue.keys.stream(delivery.stage)
        await queue.client.xclaim(
            stream, GROUP, holder, min_idle_time=0, message_ids=[delivery.entry_id], idle=milliseconds, justid=True
        )
        await look_again(queue)


async def age_all(queue: Queue, milliseconds: int) -> None:
    """The same for every entry that is held."""
    for stage in WORK:
        stream = queue.keys.stream(stage)
        pending: Any = await queue.client.xpending_range(stream, GROUP, min="-", max="+", count=1000)
        for each in pending:
            holder, entry = each["consumer"].decode(), each["message_id"]
            await queue.client.xclaim(stream, GROUP, holder, 0, [entry], idle=milliseconds, justid=True)
    await look_again(queue)


Copy = dict[bytes, tuple[bytes, bool]]


async def copy_keys(queue: Queue) -> Copy:
    """All keys of a run as the server would write them to its disk, and whether each expires.

    Without those that only time deletes, which decides nothing here.
    """
    found = [key async for key in queue.client.scan_iter(match=queue.keys.pattern, count=500)]
    keys = [key for key in found if key.decode() not in passing_keys(queue)]
    async with queue.client.pipeline(transaction=True) as pipeline:
        for key in keys:
            pipeline.dump(key)
            pipeline.pttl(key)
        copied = await pipeline.execute()
    copies = zip(keys, copied[::2], copied[1::2], strict=True)
    return {key: (data, milliseconds >= 0) for key, data, milliseconds in copies if data is not None}


async def put_back_keys(queue: Queue, copy: Copy) -> None:
    """Lose everything that was written after `copy` was made."""
    await queue.delete_run()
    async with queue.client.pipeline(transaction=True) as pipeline:
        for key, (data, expires) in copy.items():
            pipeline.restore(key, PART_TTL_MS if expires else 0, data)
        await pipeline.execute()
