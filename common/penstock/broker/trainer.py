"""The calls to Redis that only the trainer may make; each of them requires its lease.

Owns issuing, announcing, committing and dropping. Invariant: these are the only writers of the ledger, the counters
and the announced version, and a trainer that has lost its lease can call none of them (LeaseLostError).
"""

import asyncio
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.broker.keys import GROUP, Stage
from penstock.broker.lease import Lease
from penstock.broker.queue import Queue
from penstock.broker.scripts import Script, ScriptCall
from penstock.broker.worker import Delivery
from penstock.contracts import DropReason, Ticket, encode
from penstock.contracts.ledger import (
    ArchivedRecord,
    CheckpointRecord,
    DropRecord,
    LedgerState,
    Record,
    StepRecord,
    archived,
    decode_record,
    encode_record,
    replay,
)
from penstock.contracts.services import Announcement, Turn, announced_fields
from penstock.errors import LostWritesError

ISSUE = Script("trainer/issue")
ISSUE_EVAL = Script("trainer/issue_eval")
COMMIT = Script("trainer/commit")
REISSUE = Script("trainer/reissue")
DISCARD = Script("trainer/discard")
REBUILD_LEDGER = Script("trainer/rebuild_ledger")
ADOPT_LEDGER = Script("trainer/adopt_ledger")
ARCHIVE_LEDGER = Script("trainer/archive_ledger")
TAKE_TURN = Script("trainer/take_turn")
END_TURN = Script("trainer/end_turn")
READ_COUNT = 1000
WRITE_COUNT = 1000  # a script blocks all other clients
DROPPED = "dropped:"  # a reason follows


@dataclass(frozen=True)
class Counters:
    """Tickets by state, as the scripts counted them; `next_number` is the first that was never issued."""

    next_number: int
    issued: int
    trained: int
    dropped: Mapping[DropReason, int]

    @property
    def outstanding(self) -> int:
        return self.issued - self.trained - sum(self.dropped.values())


class TrainerQueue:
    """A run's queue in the hands of the trainer that holds the lease."""

    def __init__(self, queue: Queue, lease: Lease) -> None:
        self.queue = queue
        self.lease = lease
        self._keys = queue.keys
        # Of two calls of `issue` the lower numbers must come first: the script counts a ticket only if `next` rises.
        self._issuing = asyncio.Lock()
        self._ledger_end: str | None = None
        self._appending = asyncio.Lock()

    async def _run(self, call: ScriptCall) -> Any:
        """Run a script that requires the lease; once more if it had expired and no other trainer has had it since."""
        try:
            return await self.queue.run(call)
        except LostWritesError:
            await self.lease.renew(self.queue)
            return await self.queue.run(call)

    async def issue(
        self, tickets: Sequence[Ticket], announcement: Announcement | None = None, resolved: Sequence[int] = ()
    ) -> None:
        """Issue tickets; if a version is given, announce it and forget the tickets that it includes. One script."""
        keys = self._keys
        names = ("number", "digest", "path", "lease", "canary", "chunks")
        announced: dict[str, str | int | bytes] = dict.fromkeys(names, "")
        if announcement is not None:
            announced = announced_fields(announcement)
        async with self._issuing:
            await self._run(
                ISSUE(
                    lease=keys.lease,
                    policy=keys.policy,
                    live=keys.live,
                    counters=keys.counters,
                    tickets=keys.stream(Stage.TICKETS),
                    tickets_waiting=keys.waiting(Stage.TICKETS),
                    failures=keys.failures,
                    deaths=keys.deaths,
                    token=self.lease.token,
                    resolved=" ".join(map(str, resolved)),
                    issued=[{"ticket": each.key, "attempt": each.attempt, "payload": encode(each)} for each in tickets],
                    lease_number=announced.pop("lease"),
                    **announced,
                )
            )

    async def reissue(self, ticket: Ticket, delivery: Delivery) -> None:
        """Reissue a ticket whose group cannot be trained, and delete that group."""
        keys = self._keys
        await self._run(
            REISSUE(
                lease=keys.lease,
                scored=keys.stream(Stage.SCORED),
                live=keys.live,
                tickets=keys.stream(Stage.TICKETS),
                tickets_waiting=keys.waiting(Stage.TICKETS),
                parts=keys.parts(delivery.parts),
                token=self.lease.token,
                group=GROUP,
                entry=delivery.entry_id,
                ticket=ticket.key,
                attempt=ticket.attempt,
                payload=encode(ticket),
            )
        )

    async def issue_eval(self, tickets: Sequence[Ticket]) -> None:
        """Put evaluation tickets into their stream."""
        keys = self._keys
        await self._run(
            ISSUE_EVAL(
                lease=keys.lease,
                eval=keys.stream(Stage.EVAL),
                eval_waiting=keys.waiting(Stage.EVAL),
                token=self.lease.token,
                issued=[{"ticket": each.key, "payload": encode(each)} for each in tickets],
            )
        )

    async def take_turn(self, number: int) -> Turn:
        """Begin turn `number` on the GPUs, which lasts until `end_turn` or the end of the lease."""
        keys = self._keys
        await self._run(TAKE_TURN(lease=keys.lease, turn=keys.turn, token=self.lease.token, number=number))
        return Turn(self.lease.number, number)

    async def end_turn(self) -> None:
        """Give the turn on the GPUs to the engines."""
        await self._run(END_TURN(lease=self._keys.lease, turn=self._keys.turn, token=self.lease.token))

    async def commit_step(self, record: Record, groups: Mapping[int, Delivery]) -> None:
        """The commit point of a batch: append its record and delete its groups, given by ticket."""
        await self._commit(record, "trained", drop=False, groups=groups)

    async def drop(self, record: DropRecord, delivery: Delivery | None) -> None:
        """End a ticket without training it, and delete its group if there is one."""
        await self._commit(record, f"{DROPPED}{record.reason}", drop=True, groups={record.ticket: delivery})

    async def append(self, record: Record) -> None:
        """Append a record that concerns no ticket."""
        await self._commit(record, "", drop=False, groups={})

    async def _commit(self, record: Record, counter: str, *, drop: bool, groups: Mapping[int, Delivery | None]) -> None:
        keys = self._keys
        parts = [key for each in groups.values() if each is not None for key in keys.parts(each.parts)]
        async with self._appending:  # each call names the entry that ended the ledger before it
            entry = await self._run(
                COMMIT(
                    lease=keys.lease,
                    ledger=keys.ledger,
                    scored=keys.stream(Stage.SCORED),
                    live=keys.live,
                    counters=keys.counters,
                    parts=parts,
                    token=self.lease.token,
                    group=GROUP,
                    record=encode_record(record),
                    counter=counter,
                    is_drop=drop,
                    ledger_end=self._ledger_end or "",
                    groups=[{"ticket": n, "entry": each.entry_id if each else ""} for n, each in groups.items()],
                )
            )
            if self._ledger_end is not None:
                self._ledger_end = entry.decode()

    async def discard(self, delivery: Delivery) -> None:
        """Delete a scored group that is not needed any more: a duplicate, or a counted evaluation result."""
        keys = self._keys
        await self._run(
            DISCARD(
                lease=keys.lease,
                scored=keys.stream(Stage.SCORED),
                parts=keys.parts(delivery.parts),
                token=self.lease.token,
                group=GROUP,
                entry=delivery.entry_id,
            )
        )

    async def ledger(self) -> LedgerState:
        """The state after the full ledger. From the first call on, a ledger that has lost its end is detected."""
        async with self._appending:  # an entry that is appended meanwhile would be missing in what was read
            entries = await _read_entries(self.queue)
            if self._ledger_end is None:
                self._ledger_end = entries[-1][0] if entries else "0"
        return replay(record for _, record in entries)

    async def ends_as_written(self) -> bool:
        """Whether the ledger still ends with the entry that was read or written last."""
        async with self._appending:
            last = await self.queue.guard(self.queue.client.xrevrange(self._keys.ledger, count=1))
            return self._ledger_end in (None, last[0][0].decode() if last else "0")

    async def rebuild(self, records: Sequence[Record]) -> LedgerState:
        """Write a ledger that the queue has lost, and the counters that follow from it; the state after it.

        All tickets up to the highest that has ended count as issued. A crash in the middle leaves no ledger.
        """
        keys, state = self._keys, replay(records)
        for position in range(0, len(records), WRITE_COUNT):
            data = [encode_record(each) for each in records[position : position + WRITE_COUNT]]
            await self._run(
                REBUILD_LEDGER(
                    lease=keys.lease, rebuilt=keys.rebuilt, token=self.lease.token, position=position, records=data
                )
            )
        next_number = state.ended[-1][1] if state.ended else 0
        counts = {"next": next_number, "issued": next_number, "trained": state.num_trained}
        counts |= {f"{DROPPED}{reason}": count for reason, count in state.num_dropped.items()}
        await self._run(
            ADOPT_LEDGER(
                lease=keys.lease,
                ledger=keys.ledger,
                rebuilt=keys.rebuilt,
                counters=keys.counters,
                token=self.lease.token,
                counts=[{"name": name, "count": count} for name, count in counts.items()],
            )
        )
        self._ledger_end = None
        return await self.ledger()

    async def archive(
        self,
        before_step: int,
        write: Callable[[Sequence[Record]], Awaitable[int]],
        *,
        exists: Container[CheckpointRecord],
    ) -> None:
        """Replace the records before that of a step, which the ledger has, by one.

        write: adds records durably to the archive; its length. exists: the checkpoints that are still there.
        """
        keys = self._keys
        async with self._appending:
            entries = await _read_entries(self.queue)
            records = [record for _, record in entries]
            steps = {each.step: place for place, each in enumerate(records) if isinstance(each, StepRecord)}
            oldest = records[: steps[before_step]]
            num_bytes = await write([each for each in oldest if not isinstance(each, ArchivedRecord)])
            await self._run(
                ARCHIVE_LEDGER(
                    lease=keys.lease,
                    ledger=keys.ledger,
                    rebuilt=keys.rebuilt,
                    token=self.lease.token,
                    record=encode_record(archived(oldest, num_bytes, exists=exists)),
                    first=entries[steps[before_step]][0],
                    ledger_end=self._ledger_end or entries[-1][0],
                )
            )

    async def live(self) -> dict[int, str]:
        """Outstanding ticket -> `stage|entry|attempt`, as `live` has it."""
        fields = await self.queue.guard(self.queue.client.hgetall(self._keys.live))
        return {int(ticket): place.decode() for ticket, place in fields.items()}

    async def counters(self) -> Counters:
        return await read_counters(self.queue)


async def read_ledger(queue: Queue) -> list[Record]:
    """All records in order; anyone may read."""
    return [record for _, record in await _read_entries(queue)]


async def first_record(queue: Queue) -> Record | None:
    """The record that begins the ledger; anyone may read."""
    entries = await queue.guard(queue.client.xrange(queue.keys.ledger, count=1))
    return decode_record(entries[0][1][b"r"]) if entries else None


async def _read_entries(queue: Queue) -> list[tuple[str, Record]]:
    records: list[tuple[str, Record]] = []
    start = "-"
    while entries := await queue.guard(queue.client.xrange(queue.keys.ledger, min=start, count=READ_COUNT)):
        records.extend((entry.decode(), decode_record(fields[b"r"])) for entry, fields in entries)
        start = f"({entries[-1][0].decode()}"
    return records


async def read_counters(queue: Queue) -> Counters:
    """Tickets by state; anyone may read."""
    raw = await queue.guard(queue.client.hgetall(queue.keys.counters))
    fields = {name.decode(): int(value) for name, value in raw.items()}
    reasons = {name: name.removeprefix(DROPPED) for name in fields if name.startswith(DROPPED)}
    dropped = {DropReason(reason): fields[name] for name, reason in reasons.items()}
    return Counters(fields.get("next", 0), fields.get("issued", 0), fields.get("trained", 0), dropped)
