"""One consumer of the work streams: takes entries, renews those that it holds, hands them over, gives back, buries.

Invariant: an entry is deleted only by the script that adds its successor, and only while this consumer holds it; a late
worker publishes nothing, and a stranger to the run (`penstock.broker.identity`) takes and publishes nothing. The parts
of a group are written before the entry that names them, and are read separately. The finished episodes of a ticket are
kept beside its entry, as long as that: whoever has the entry next makes only those that are missing.
"""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from penstock.broker.keys import GROUP, Stage, part_name
from penstock.broker.queue import FULL_RETRY_SECONDS, Queue
from penstock.broker.scripts import Given, Script
from penstock.config import StalenessSection
from penstock.contracts import DropReason, PolicyIdentity, RolloutGroup
from penstock.contracts.services import ServiceRecord
from penstock.contracts.stored_groups import Part, ScoredHeader, Taught, stored

log = logging.getLogger(__name__)

TAKE = Script("worker/take")
HAND_OVER = Script("worker/hand_over")
GIVE_BACK = Script("worker/give_back")
BURY = Script("worker/bury")
BEAT = Script("worker/beat")
RENEW = Script("worker/renew")
STORE_EPISODE = Script("worker/store_episode")
MAX_ENGINE_DEATHS = 3  # another ticket may have caused two; the third happens while this one runs alone
RENEWALS_PER_IDLE_TIME = 3
ASKS_PER_SECOND = 32  # of all workers that wait for tickets, together; more if there are over 960 of them
LATE_SECONDS = 1.0  # how late a worker may ask again, and is still woken meanwhile
FOR_ALL_SECONDS = 60.0  # between two heartbeats of a worker that count all workers, and may tidy up after the dead
REFUSED_SECONDS = 0.1  # between two attempts of a worker that may take nothing
PART_TTL_MS = 60_000  # of a part that no entry names yet; the script that names it follows at once
EPISODES_TTL_MS = 24 * 3600_000  # of the finished episodes of a ticket that nobody holds; a holder renews it


class EntryOutcome(StrEnum):
    """The fate of an entry, as the scripts answer it."""

    MOVED = "moved"
    FREE = "free"
    BURIED = "buried"
    LATE = "late"
    """Another consumer has the entry: nothing was changed."""
    KEPT = "kept"
    """Its finished episode is stored."""
    NO_PARTS = "no parts"
    """A server that was full or away has not kept the parts: nothing was changed."""


@dataclass(frozen=True)
class Served:
    """The version of a server and its lease: it gets no ticket while another version or a later lease is announced.

    It gets none before a version is announced. With a version that is newer than the announced one it gets tickets too:
    the version has been pushed, and is announced soon.
    """

    identity: PolicyIdentity
    lease: int


@dataclass(frozen=True)
class Delivery:
    """An entry that this worker holds. If there is nothing to decode, `payload` is empty and `reason` set.

    parts: the name of its group's large fields; empty if it has none.
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
    """A consumer. Its name is new at every start, so that entries of an earlier life count as another consumer's."""

    def __init__(self, queue: Queue, name: str, staleness: StalenessSection, *, take_over: bool = False) -> None:
        """`take_over`: claim all entries of others; only for the trainer, which is alone by its lease."""
        self.name = f"{name}-{uuid.uuid4().hex[:8]}"
        self._queue = queue
        self._staleness = staleness
        self._take_over = self._takes_over_at_once = take_over
        self._held: dict[Stage, set[str]] = {stage: set() for stage in Stage}
        self._with_episodes: set[tuple[Stage, str]] = set()
        self._refused = self._expects_wakeup = False
        self._beaten = False
        self._num_workers, self._next_for_all = 1, 0.0

    @property
    def num_held(self) -> int:
        return sum(map(len, self._held.values()))

    @property
    def refused(self) -> bool:
        """Whether the last call that was to take an entry was refused: this server is behind, or a stranger."""
        return self._refused

    @property
    def expects_wakeup(self) -> bool:
        """Whether the next entry wakes this worker: the last `take` left none, or woke others for them. So `wait`."""
        return self._expects_wakeup

    async def take(self, *stages: Stage, served: Served | None = None, has_room: bool = False) -> Delivery | None:
        """The next entry of the first stage that has one for us, those of dead holders first; None if there is none.

        `has_room`: it will have room for another entry beside this one, and takes that as soon as it is woken for it.
        """
        found = await self._take(stages, served, limit=1, has_room=has_room)
        return found[0] if found else None

    async def take_several(self, stage: Stage, limit: int) -> list[Delivery]:
        """Like `take` of a worker that has room, but up to `limit` entries of one stage."""
        return await self._take((stage,), None, limit, has_room=True)

    async def _take(
        self, stages: Sequence[Stage], served: Served | None, limit: int, *, has_room: bool
    ) -> list[Delivery]:
        keys = self._queue.keys
        if not self._beaten:
            await self._beat()
        if self._takes_over_at_once:
            await self._queue.delete([keys.looked(each) for each in stages])
            self._takes_over_at_once = False
        call = TAKE(
            lease=keys.lease,
            launcher=keys.launcher,
            woken=keys.woken(self.name),
            has_room=has_room,
            waits_ms=int(1000 * (self._queue.longest_block_seconds + LATE_SECONDS)),
            **self._for_take(stages, served, limit),
        )
        taken, waits = await self._queue.run(call)
        self._expects_wakeup = bool(waits)
        return self._deliveries(stages, taken)

    def _for_take(self, stages: Sequence[Stage], served: Served | None, limit: int) -> dict[str, Given]:
        """The keys and arguments of `take()` in `lua/shared`."""
        keys = self._queue.keys
        number, digest, lease = (
            (-1, "", -1) if served is None else (served.identity.number, served.identity.digest, served.lease)
        )
        return {
            "beats": keys.beats,
            "policy": keys.policy,
            "failures": keys.failures,
            "deaths": keys.deaths,
            "identity": keys.identity,
            **self._queue.identity.compared,
            "stages": [
                {"stream": keys.stream(each), "waiting": keys.waiting(each), "looked": keys.looked(each)}
                for each in stages
            ],
            "group": GROUP,
            "consumer": self.name,
            "served_number": number,
            "served_digest": digest,
            "served_lease": lease,
            "idle_ms": int(self._staleness.claim_idle_seconds * 1000),
            "take_over": self._take_over,
            "limit": limit,
        }

    def _deliveries(self, stages: Sequence[Stage], answer: Any) -> list[Delivery]:
        """The entries in a script's answer: held from now on. None: this worker may take nothing.

        Without those that it holds already. It has taken them from itself, since it was too late to renew them: as
        further deliveries they would be duplicates, to be deleted, of what it works on.
        """
        self._refused = answer is None
        found = []
        for place, entry_id, flat, failures, deaths in answer or ():
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
            if delivery.entry_id not in self._held[delivery.stage]:
                self._held[delivery.stage].add(delivery.entry_id)
                found.append(delivery)
        return found

    @property
    def ask_seconds(self) -> float:
        """How long to wait for a ticket before the next `take`: 1 s, longer if there are many workers, at most 30 s.

        Any of them finds what one would have missed.
        """
        return min(max(1.0, self._num_workers / ASKS_PER_SECOND), self._queue.longest_block_seconds)

    async def wait(self, *, timeout_seconds: float) -> None:
        """Return once a stage of the last `take` may have an entry for us, or after the timeout.

        Then `take`. An entry that is added wakes one of those who wait. It is missed only if that one dies before its
        `take`; so ask every `ask_seconds`. One task of a worker takes and waits; others only hand over.
        """
        if self._refused:  # another can use the entry
            await asyncio.sleep(min(timeout_seconds, REFUSED_SECONDS))
        else:
            await self._queue.wait_for_wakeup(self._queue.keys.woken(self.name), timeout_seconds)

    async def read(self, deliveries: Sequence[Delivery], *parts: Part) -> list[dict[Part, bytes | None]]:
        """These parts of the groups of deliveries, in one call; None for a missing one."""
        named = [(place, part) for place, each in enumerate(deliveries) if each.parts for part in parts]
        keys = [self._queue.keys.part(deliveries[place].parts, part) for place, part in named]
        found: list[dict[Part, bytes | None]] = [dict.fromkeys(parts) for _ in deliveries]
        for (place, part), data in zip(named, await self._queue.read(keys), strict=True):
            found[place][part] = data
        return found

    async def store_episode(self, delivery: Delivery, index: int, data: bytes) -> bool:
        """Keep a finished episode until the ticket is handed over or buried, by whomever; the first one stays.

        False: the entry is another worker's by now, which makes the episode itself.
        """
        keys = self._queue.keys
        self._with_episodes.add((delivery.stage, delivery.entry_id))
        outcome = await self._queue.run(
            STORE_EPISODE(
                source=keys.stream(delivery.stage),
                episodes=keys.episodes(delivery.stage, delivery.entry_id),
                identity=keys.identity,
                **self._queue.identity.compared,
                group=GROUP,
                consumer=self.name,
                entry=delivery.entry_id,
                index=index,
                episode=data,
                alive_ms=EPISODES_TTL_MS,
            )
        )
        return EntryOutcome(outcome.decode()) == EntryOutcome.KEPT

    async def stored_episodes(self, delivery: Delivery) -> dict[int, bytes]:
        """The finished episodes of a ticket, by index, as this worker and earlier holders have stored them."""
        found = await self._queue.read_map(self._queue.keys.episodes(delivery.stage, delivery.entry_id))
        if found:
            self._with_episodes.add((delivery.stage, delivery.entry_id))
        return {int(index): data for index, data in found.items()}

    async def hand_over(self, delivery: Delivery, message: RolloutGroup | ScoredHeader | Taught, to: Stage) -> bool:
        """Replace the entry by its successor in the next stage. If it is not ours: False, and nothing is published."""
        moved, _ = await self.hand_over_and_take(delivery, message, to)
        return moved

    async def hand_over_and_take(
        self,
        delivery: Delivery,
        message: RolloutGroup | ScoredHeader | Taught,
        to: Stage,
        *stages: Stage,
        served: Served | None = None,
    ) -> tuple[bool, Delivery | None]:
        """`hand_over` and then `take`, in one script: a busy worker needs one call for each group."""
        keys, form = self._queue.keys, stored(message)
        # A new name: a late worker must not overwrite the parts that the holder published. What a teacher adds gets
        # that of its group: there NX keeps the first one. If it covers other trajectories than this worker has scored,
        # the trainer issues the ticket again.
        is_new = Part.COMPLETIONS in form.parts
        name = uuid.uuid4().hex if is_new else delivery.parts
        if not name:
            raise ValueError(f"ticket {delivery.ticket_key} has no parts in the queue: expected a group to hand over")
        call = HAND_OVER(
            source=keys.stream(delivery.stage),
            target=keys.stream(to),
            live=keys.live,
            target_waiting=keys.waiting(to),
            completions=keys.part(name, Part.COMPLETIONS),
            texts=keys.part(name, Part.TEXTS),
            teacher=keys.part(name, Part.TEACHER),
            episodes=keys.episodes(delivery.stage, delivery.entry_id),
            entry=delivery.entry_id,
            ticket=delivery.ticket_key,
            attempt=delivery.attempt,
            target_stage=to,
            payload=form.header,
            parts=name,
            has_new_parts=is_new,
            is_taught=Part.TEACHER in form.parts,
            texts_unread=Part.TEXTS in form.unread,
            **self._for_take(stages, served, limit=1),
        )
        # NX: if these are repeated after the script, they must not give the parts a time to live again.
        first = [("SET", keys.part(name, part), data, "NX", "PX", PART_TTL_MS) for part, data in form.parts.items()]
        warned = False
        while True:
            answer, taken = await self._queue.run(call, first)
            if (outcome := EntryOutcome(answer.decode())) != EntryOutcome.NO_PARTS:
                break
            if not warned:
                log.warning(
                    "the queue lost the parts of ticket %s: it is full, or was away; trying again", delivery.ticket_key
                )
                warned = True
            await asyncio.sleep(FULL_RETRY_SECONDS)
        self.forget(delivery)
        if outcome == EntryOutcome.LATE:
            log.warning("late: ticket %s had gone to another worker; its result is not published", delivery.ticket_key)
        found = self._deliveries(stages, taken) if stages else []  # else nothing was asked, and nothing refused
        return outcome == EntryOutcome.MOVED, found[0] if found else None

    async def give_back(
        self, delivery: Delivery, *, failed: bool = False, engine_died: bool = False, reason: str = ""
    ) -> None:
        """Make the entry free for others at once.

        `failed` counts towards staleness.max_deliveries, `engine_died` towards three deaths. At either limit the
        ticket is poison: the entry goes to `dead` with the reason, and the trainer drops the ticket.
        """
        keys = self._queue.keys
        outcome = await self._queue.run(
            GIVE_BACK(
                source_waiting=keys.waiting(delivery.stage),
                failures=keys.failures,
                deaths=keys.deaths,
                has_failed=failed,
                has_died=engine_died,
                max_failures=self._staleness.max_deliveries,
                max_deaths=MAX_ENGINE_DEATHS,
                **self._for_bury(delivery, reason or str(DropReason.POISON)),
            )
        )
        self.forget(delivery)
        if EntryOutcome(outcome.decode()) == EntryOutcome.BURIED:
            log.error("ticket %s is poison: %s", delivery.ticket_key, reason, extra={"ticket": delivery.ticket_key})

    async def bury(self, delivery: Delivery, reason: str) -> bool:
        """Move the entry to `dead`: nobody can use it. The trainer drops its ticket as poison.

        If we do not hold it: False, and nothing is moved, since its holder may be able to use it.
        """
        outcome = await self._queue.run(BURY(**self._for_bury(delivery, reason)))
        self.forget(delivery)
        buried = EntryOutcome(outcome.decode()) == EntryOutcome.BURIED
        if buried:
            log.error("dead letter from %s: %s", delivery.stage, reason, extra={"ticket": delivery.ticket_key})
        else:
            log.warning("late: ticket %s had gone to another worker; %s", delivery.ticket_key, reason)
        return buried

    def _for_bury(self, delivery: Delivery, reason: str) -> dict[str, Given]:
        """The keys and arguments of `bury()` in `lua/shared`."""
        keys = self._queue.keys
        return {
            "source": keys.stream(delivery.stage),
            "dead": keys.dead,
            "scored": keys.stream(Stage.SCORED),
            "live": keys.live,
            "scored_waiting": keys.waiting(Stage.SCORED),
            "episodes": keys.episodes(delivery.stage, delivery.entry_id),
            "identity": keys.identity,
            **self._queue.identity.compared,
            "group": GROUP,
            "consumer": self.name,
            "entry": delivery.entry_id,
            "ticket": delivery.ticket_key,
            "attempt": delivery.attempt,
            "reason": reason,
            "stage": delivery.stage,
            "payload": delivery.payload,
            "parts": delivery.parts,
        }

    def forget(self, delivery: Delivery) -> None:
        """Stop renewing an entry."""
        self._held[delivery.stage].discard(delivery.entry_id)
        self._with_episodes.discard((delivery.stage, delivery.entry_id))

    async def keep_alive(
        self, record: Callable[[], ServiceRecord] | None = None, *, ready: asyncio.Event | None = None
    ) -> None:
        """Send heartbeats and renew all held entries, for ever. Without it other workers take them.

        record: of the service whose worker this is, shown to the others with each heartbeat. ready: the next heartbeat
        follows at once when this becomes set. StrangerError: the service may not be shown, since the run is another's.
        """
        beat_every = self._staleness.heartbeat_seconds / RENEWALS_PER_IDLE_TIME
        renew_every = self._staleness.claim_idle_seconds / RENEWALS_PER_IDLE_TIME
        next_renewal = 0.0
        while True:
            await self._beat(None if record is None else record())
            now = asyncio.get_running_loop().time()
            if now >= next_renewal:
                await self._renew()
                next_renewal = now + renew_every
            await _sleep_until(ready, min(beat_every, renew_every))

    async def retire(self) -> None:
        """Mark this worker as dead, so that others can take its entries at once, and no entry wakes it."""
        keys = self._queue.keys
        await self._queue.forget(keys.beats, self.name)
        for stage in Stage:
            await self._queue.leave(keys.waiting(stage), self.name)
        await self._queue.delete([keys.looked(stage) for stage in Stage])

    async def _beat(self, record: ServiceRecord | None = None) -> None:
        keys, now = self._queue.keys, asyncio.get_running_loop().time()
        if for_all := now >= self._next_for_all:
            self._next_for_all = now + FOR_ALL_SECONDS
        num_workers = await self._queue.run(
            BEAT(
                beats=keys.beats,
                tidied=keys.tidied,
                streams=[keys.stream(stage) for stage in Stage],
                services=keys.services,
                identity=keys.identity,
                lease=keys.lease,
                launcher=keys.launcher,
                group=GROUP,
                name=self.name,
                record=b"" if record is None else msgspec.json.encode(record),
                alive_ms=int(self._staleness.heartbeat_seconds * 1000),
                for_all=for_all,
                **self._queue.identity.compared,
            )
        )
        self._num_workers = num_workers or self._num_workers
        self._beaten = True

    async def _renew(self) -> None:
        for stage, entries in self._held.items():
            if entries:
                keys = self._queue.keys
                await self._queue.run(
                    RENEW(
                        stream=keys.stream(stage),
                        episodes=[
                            keys.episodes(stage, each) for each in entries if (stage, each) in self._with_episodes
                        ],
                        group=GROUP,
                        consumer=self.name,
                        alive_ms=EPISODES_TTL_MS,
                        entries=list(entries),
                    )
                )


async def _sleep_until(ready: asyncio.Event | None, seconds: float) -> None:
    """Sleep for so long, or until this becomes set if it is not."""
    if ready is None or ready.is_set():
        await asyncio.sleep(seconds)
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await ready.wait()
