"""One consumer of the work streams: takes entries, renews what it holds, hands over, gives back, buries.

Invariant: an entry is deleted only by the script that puts its successor in place, and only while it is held by this
consumer; a late worker publishes nothing. The parts of a group are written before the entry that names them, and are
read on their own.
"""

import asyncio
import logging
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from penstock.broker import scripts
from penstock.broker.calls import Command
from penstock.broker.keys import GROUP, Stage, part_name
from penstock.broker.queue import FULL_RETRY_SECONDS, Queue
from penstock.config import StalenessSection
from penstock.contracts import DropReason, RolloutGroup
from penstock.contracts.stored_groups import Part, ScoredHeader, Stored, stored

log = logging.getLogger(__name__)

MAX_ENGINE_DEATHS = 3  # two may be another ticket's fault; the third happens while it runs alone
RENEWALS_PER_IDLE_TIME = 3
PART_TTL_MS = 60_000  # of a part that no entry names yet; the script that names it comes right behind it
MOVED, NO_PART = 1, 2  # what HAND_OVER answers


@dataclass(frozen=True)
class Served:
    """What a server generates with: it gets nothing while a newer version, or one of a later lease, is announced."""

    number: int
    lease: int


@dataclass(frozen=True)
class Delivery:
    """An entry that this worker holds. `payload` is empty and `reason` set where there is nothing to decode.

    parts: the name of what is heavy of its group; empty where it has none.
    """

    stage: Stage
    entry_id: str
    ticket_key: str
    attempt: int
    payload: bytes
    reason: str
    failures: int
    engine_deaths: int
    parts: str = ""


class Worker:
    """A consumer. Its name is new at every start, so that work of an earlier life counts as another's."""

    def __init__(self, queue: Queue, name: str, staleness: StalenessSection, *, take_over: bool = False) -> None:
        """`take_over`: claim at once whatever others hold; only for the trainer, whose lease makes it the only one."""
        self.name = f"{name}-{uuid.uuid4().hex[:8]}"
        self._queue = queue
        self._staleness = staleness
        self._take_over = take_over
        self._held: dict[Stage, set[str]] = defaultdict(set)
        self._last_wake: dict[Stage, str] = {}
        self._beaten = False

    @property
    def num_held(self) -> int:
        return sum(map(len, self._held.values()))

    async def take(self, *stages: Stage, served: Served | None = None) -> Delivery | None:
        """The next entry of the first stage that has one for us, one whose holder is dead first; None without any."""
        found = await self._take(stages, served, limit=1)
        return found[0] if found else None

    async def take_several(self, stage: Stage, limit: int) -> list[Delivery]:
        """Up to `limit` entries of a stage, as `take` gives one."""
        return await self._take((stage,), None, limit)

    async def _take(self, stages: Sequence[Stage], served: Served | None, limit: int) -> list[Delivery]:
        if not self._beaten:
            await self._beat()
        arguments = [GROUP, self.name, *self._take_arguments(served, limit)]
        return self._deliveries(stages, await self._queue.run(scripts.TAKE, self._take_keys(stages), arguments))

    def _take_keys(self, stages: Sequence[Stage]) -> list[str]:
        keys = self._queue.keys
        return [keys.beats, keys.policy, keys.failures, keys.deaths, *map(keys.stream, stages), *map(keys.wake, stages)]

    def _take_arguments(self, served: Served | None, limit: int) -> list[int]:
        number, lease = (-1, -1) if served is None else (served.number, served.lease)
        return [number, lease, int(self._staleness.claim_idle_seconds * 1000), int(self._take_over), limit]

    def _deliveries(self, stages: Sequence[Stage], answer: Any) -> list[Delivery]:
        """What a script gave us: held from now on. Where that is nothing, `wait` waits for what came after."""
        entries, ends = answer
        self._last_wake.update(zip(stages[: len(ends)], map(bytes.decode, ends), strict=True))
        found = []
        for place, entry_id, flat, failures, deaths in entries:
            fields = dict(zip(flat[::2], flat[1::2], strict=True))
            attempt = fields.get(b"a", b"0")
            delivery = Delivery(
                stage=stages[place],
                entry_id=entry_id.decode(),
                ticket_key=fields.get(b"t", b"").decode(errors="replace"),
                attempt=int(attempt) if attempt.isdigit() else 0,
                payload=fields.get(b"p", b""),
                reason=fields.get(b"x", b"").decode(errors="replace"),
                failures=failures,
                engine_deaths=deaths,
                parts=part_name(fields.get(b"n", b"")),
            )
            self._held[delivery.stage].add(delivery.entry_id)
            found.append(delivery)
        return found

    async def wait(self, *stages: Stage, timeout_seconds: float) -> None:
        """Return when something new may be in one of the stages, or after the timeout. Nothing is missed between."""
        streams = {self._queue.keys.wake(stage): self._last_wake.get(stage, "0") for stage in stages}
        seen = await self._queue.next_of(streams, timeout_seconds)
        for stage in stages:
            if (last := seen.get(self._queue.keys.wake(stage))) is not None:
                self._last_wake[stage] = last

    async def read(self, deliveries: Sequence[Delivery], *parts: Part) -> list[dict[Part, bytes | None]]:
        """These parts of the groups of deliveries, in one call; None for one that is not there."""
        named = [(place, part) for place, each in enumerate(deliveries) if each.parts for part in parts]
        keys = [self._queue.keys.part(deliveries[place].parts, part) for place, part in named]
        found: list[dict[Part, bytes | None]] = [dict.fromkeys(parts) for _ in deliveries]
        for (place, part), data in zip(named, await self._queue.read(keys), strict=True):
            found[place][part] = data
        return found

    async def hand_over(self, delivery: Delivery, message: RolloutGroup | ScoredHeader, to: Stage) -> bool:
        """Replace the entry by its successor in the next stage; False, and nothing published, if it is not ours."""
        moved, _ = await self.hand_over_and_take(delivery, message, to)
        return moved

    async def hand_over_and_take(
        self,
        delivery: Delivery,
        message: RolloutGroup | ScoredHeader,
        to: Stage,
        *stages: Stage,
        served: Served | None = None,
    ) -> tuple[bool, Delivery | None]:
        """`hand_over` and then `take`, in one script: one call for each group of a worker that is busy."""
        keys, form = self._queue.keys, stored(message)
        # A new name: what a late worker writes must not lie over what the holder published.
        name = uuid.uuid4().hex if form.parts else delivery.parts
        if not name:
            raise ValueError(f"ticket {delivery.ticket_key} has no parts in the queue: expected a group to hand over")
        script_keys = [keys.stream(delivery.stage), keys.stream(to), keys.live, keys.wake(to), *keys.parts(name)]
        arguments = [
            *(GROUP, self.name, delivery.entry_id, delivery.ticket_key, delivery.attempt),
            *(str(to), form.head, name, int(bool(form.parts)), int(Part.TEXTS in form.unread)),
            *self._take_arguments(served, limit=1),
        ]
        script_keys += self._take_keys(stages)
        first, warned = self._writes(name, form), False
        while (answer := await self._queue.run(scripts.HAND_OVER, script_keys, arguments, first))[0] == NO_PART:
            if not warned:
                log.warning("the queue kept nothing of ticket %s's group: it is full, or was away", delivery.ticket_key)
                warned = True
            await asyncio.sleep(FULL_RETRY_SECONDS)
        outcome, taken = answer
        self.forget(delivery)
        if outcome != MOVED:
            log.warning("late: ticket %s had gone to another worker; its result is not published", delivery.ticket_key)
        found = self._deliveries(stages, taken)
        return outcome == MOVED, found[0] if found else None

    def _writes(self, name: str, form: Stored) -> list[Command]:
        """NX: where they are repeated after the script has run, they must not give what it named a time to live."""
        return [
            ("SET", self._queue.keys.part(name, part), data, "NX", "PX", PART_TTL_MS)
            for part, data in form.parts.items()
        ]

    async def give_back(
        self, delivery: Delivery, *, failed: bool = False, engine_died: bool = False, reason: str = ""
    ) -> None:
        """Make the entry free for others at once.

        `failed` counts towards staleness.max_deliveries, `engine_died` towards three deaths; either then makes the
        ticket poison: the entry goes to `dead` with the reason and the trainer hears of it.
        """
        keys = self._queue.keys
        outcome = await self._queue.run(
            scripts.GIVE_BACK,
            [
                keys.stream(delivery.stage),
                keys.dead,
                keys.stream(Stage.SCORED),
                keys.live,
                keys.wake(Stage.SCORED),
                keys.wake(delivery.stage),
                keys.failures,
                keys.deaths,
            ],
            [
                *self._burial(delivery, reason or DropReason.POISON),
                int(failed),
                int(engine_died),
                self._staleness.max_deliveries,
                MAX_ENGINE_DEATHS,
            ],
        )
        self.forget(delivery)
        if outcome == 2:
            log.error("ticket %s is poison: %s", delivery.ticket_key, reason, extra={"ticket": delivery.ticket_key})

    async def bury(self, delivery: Delivery, reason: str) -> bool:
        """Move the entry to `dead`: it cannot be used by anyone. The trainer resolves its ticket as poison.

        False, and nothing moved, if it is not ours: whoever holds it may well use it.
        """
        keys = self._queue.keys
        moved = await self._queue.run(
            scripts.BURY,
            [keys.stream(delivery.stage), keys.dead, keys.stream(Stage.SCORED), keys.live, keys.wake(Stage.SCORED)],
            self._burial(delivery, reason),
        )
        self.forget(delivery)
        if moved:
            log.error("dead letter from %s: %s", delivery.stage, reason, extra={"ticket": delivery.ticket_key})
        else:
            log.warning("late: ticket %s had gone to another worker; %s", delivery.ticket_key, reason)
        return bool(moved)

    def _burial(self, delivery: Delivery, reason: str) -> list[str | int | bytes]:
        return [
            GROUP,
            self.name,
            delivery.entry_id,
            delivery.ticket_key,
            delivery.attempt,
            reason,
            str(delivery.stage),
            delivery.payload,
            delivery.parts,
        ]

    def forget(self, delivery: Delivery) -> None:
        """Stop renewing an entry."""
        self._held[delivery.stage].discard(delivery.entry_id)

    async def keep_alive(self) -> None:
        """Beat and renew everything held, for ever. Without it the work goes to others."""
        beat_every = self._staleness.heartbeat_seconds / RENEWALS_PER_IDLE_TIME
        renew_every = self._staleness.claim_idle_seconds / RENEWALS_PER_IDLE_TIME
        next_renewal = 0.0
        while True:
            await self._beat()
            now = asyncio.get_running_loop().time()
            if now >= next_renewal:
                await self._renew()
                next_renewal = now + renew_every
            await asyncio.sleep(min(beat_every, renew_every))

    async def retire(self) -> None:
        """Count as dead from now on, so that whatever is still held is free at once."""
        await self._queue.guard(self._queue.client.hdel(self._queue.keys.beats, self.name))

    async def _beat(self) -> None:
        milliseconds = int(self._staleness.heartbeat_seconds * 1000)
        keys = self._queue.keys
        streams = map(keys.stream, Stage)
        await self._queue.run(scripts.BEAT, [keys.beats, *streams], [GROUP, self.name, milliseconds])
        self._beaten = True

    async def _renew(self) -> None:
        for stage, entries in self._held.items():
            if entries:
                await self._queue.run(scripts.RENEW, [self._queue.keys.stream(stage)], [GROUP, self.name, *entries])
