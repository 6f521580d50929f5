"""A run in miniature as pure states: tickets, two workers that may crash anywhere, late results, announcements.

Each step of the model stands for one script of the broker, named in its comment. A worker that is believed dead lives
on and may hand over late. Each of the three staleness rules can be left out:

    rule 1  a ticket keeps its credit until a version that includes its step is announced   TicketBook.announce
    rule 2  a server that serves an older version than announced takes no ticket            worker/take.lua
    rule 3  the versions that the engine reports are checked before a batch is trained      Consumer.next_batch

With `parts` a hand-over is two steps, the write of the group's parts and the script, and time passes between them.
Three more rules, each of which can be left out too:

    named only if there   the script refuses to name parts that have expired                worker/hand_over.lua
    written once          a repeated write leaves existing parts unchanged                  Worker._writes (NX)
    late leaves them      a script whose caller does not hold the entry changes no parts    worker/hand_over.lua

"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

TICKETS, HELD, ARRIVED, COMMITTED, TRAINED = "tickets", "held", "arrived", "committed", "trained"
ORDER = {stage: rank for rank, stage in enumerate((TICKETS, HELD, ARRIVED, COMMITTED, TRAINED))}
FREE = -1
GONE = -1
KEPT, EXPIRING, LOST = "kept", "expiring", "lost"


@dataclass(frozen=True)
class Rules:
    """Which rules the model obeys, and whether servers may report a wrong version."""

    keep_credits: bool = True
    refuse_older: bool = True
    check_versions: bool = True
    liars: bool = False
    named_only_if_there: bool = True
    written_once: bool = True
    late_leaves_them: bool = True


@dataclass(frozen=True)
class Place:
    """A ticket: its stage, the worker that its entry is pending for, and the version that generated its group.

    parts: KEPT, EXPIRING or LOST, if its entry names the parts of a group.
    """

    stage: str = TICKETS
    owner: int = FREE
    made_by: int = 0
    step: int = -1
    parts: str = ""


@dataclass(frozen=True)
class Worker:
    """version: the served one; holds: the ticket that it believes to hold; started: the version that it began with;
    wrote: its group's parts are written and no entry names them yet; repeats: the ticket whose answer was lost.

    An entry that was replaced is GONE: ids of entries are never used again, so no script can mistake it for a new one.
    """

    version: int = 0
    holds: int | None = None
    started: int = 0
    alive: bool = True
    wrote: bool = False
    repeats: int | None = None


@dataclass(frozen=True)
class State:
    """The full state of the queue, the trainer and the workers."""

    places: tuple[Place, ...] = ()
    workers: tuple[Worker, ...] = (Worker(), Worker())
    announced: int = 0
    steps: int = 0
    crashes: int = 0


@dataclass(frozen=True)
class Model:
    """One small run with B tickets per step."""

    rules: Rules
    num_draws: int
    batch_size: int = 1
    max_staleness: int = 0
    max_crashes: int = 2
    parts: bool = False

    @property
    def credits(self) -> int:
        return (self.max_staleness + 1) * self.batch_size

    def start(self) -> State:
        return self._issue(State())

    def moves(self, state: State) -> Iterator[tuple[str, State]]:
        for number, worker in enumerate(state.workers):
            yield from self._worker_moves(state, number, worker)
        batch = self.next_batch(state)
        if batch:
            stale = [n for n in batch if state.steps - state.places[n].made_by > self.max_staleness]
            if stale and self.rules.check_versions:
                yield f"reissue {stale}", _put_all(state, stale, _reissued)
            else:
                yield f"commit {batch}", self._commit(state, batch)
        for version in range(state.announced + 1, state.steps + 1):
            yield f"announce {version}", self._announce(state, version)
        for ticket, place in enumerate(state.places):
            if place.parts == EXPIRING:
                yield f"the parts of {ticket} expire", _put(state, ticket, replace(place, parts=LOST))

    def _worker_moves(self, state: State, number: int, worker: Worker) -> Iterator[tuple[str, State]]:
        if worker.repeats is not None:
            yield f"{number} repeats its script", self._repeat(state, number, worker)
        elif worker.holds is None:
            yield from self._takes(state, number)
        else:
            if self.parts:
                step = "its parts expire" if worker.wrote else "writes parts"
                yield f"{number}: {step}", _with_worker(state, number, replace(worker, wrote=not worker.wrote))
            idle = self._hand_over(state, number, worker)
            yield f"{number} hands over {worker.holds}", idle
            # worker/hand_over.lua takes in the same step; if its answer is lost, the group is handed over all the same.
            for name, after in self._takes(idle, number):
                yield f"{number} hands over {worker.holds} and {name}", after
            if self.parts and idle != state and state.crashes < self.max_crashes:
                unanswered = replace(idle.workers[number], repeats=worker.holds)
                after = replace(_with_worker(idle, number, unanswered), crashes=state.crashes + 1)
                yield f"{number} hands over {worker.holds} and is not answered", after
            # worker/give_back.lua.
            yield f"{number} gives back", self._let_go(state, number, worker)
        if worker.version < state.steps:
            # A push, or a load by the server itself: staged weights are at most those of the newest step.
            yield (
                f"{number} loads {worker.version + 1}",
                _with_worker(state, number, replace(worker, version=worker.version + 1)),
            )
        if worker.alive and state.crashes < self.max_crashes:
            # Its heartbeat has expired. It really died if it never moves again.
            dead = _with_worker(state, number, replace(worker, alive=False))
            yield f"{number} is believed dead", replace(dead, crashes=state.crashes + 1)
        elif not worker.alive:
            # worker/beat.lua of a worker that was only slow; a new process holds nothing.
            yield f"{number} beats again", _with_worker(state, number, replace(worker, alive=True))
            yield f"{number} starts anew", self._start_anew(state, number, worker)

    def _takes(self, state: State, number: int) -> Iterator[tuple[str, State]]:
        """worker/take.lua: the worker gets a free entry, or one whose holder's heartbeat has expired."""
        worker = state.workers[number]
        for ticket, place in enumerate(state.places):
            if self._may_take(state, worker, ticket):
                taken = _put(state, ticket, replace(place, stage=HELD, owner=number))
                holding = replace(worker, holds=ticket, started=worker.version)
                yield f"{number} takes {ticket}", _with_worker(taken, number, holding)
                if state.crashes < self.max_crashes:
                    # The answer is lost with a connection and the take is repeated: no worker renews this entry.
                    yield f"{number} takes {ticket} unknowingly", replace(taken, crashes=state.crashes + 1)

    def _may_take(self, state: State, worker: Worker, ticket: int) -> bool:
        place = state.places[ticket]
        if self.rules.refuse_older and not self.rules.liars and worker.version < state.announced:
            return False
        if not worker.alive or place.stage not in (TICKETS, HELD):
            return False
        owner = state.workers[place.owner]
        return place.stage == TICKETS or not (owner.alive and owner.holds == ticket)

    def _start_anew(self, state: State, number: int, worker: Worker) -> State:
        """A new process has a new name; entries of the old name become free, since it never beats again."""
        mine = [ticket for ticket, place in enumerate(state.places) if place.owner == number]
        return _put_all(_with_worker(state, number, Worker(version=worker.version)), mine, lambda _: Place())

    def _hand_over(self, state: State, number: int, worker: Worker) -> State:
        """worker/hand_over.lua: if XPENDING does not show this very entry as the worker's, nothing is published."""
        idle = _with_worker(state, number, replace(worker, holds=None, started=0, wrote=False))
        ticket = worker.holds
        if ticket is None or ticket == GONE or state.places[ticket].owner != number:
            return idle
        if self.parts and self.rules.named_only_if_there and not worker.wrote:
            return state  # the worker writes them again
        parts = (KEPT if worker.wrote else LOST) if self.parts else ""
        # Running requests continue with newer weights: the oldest token is by the version at the start.
        return _replaced(_put(idle, ticket, Place(ARRIVED, made_by=worker.started, parts=parts)), ticket)

    def _repeat(self, state: State, number: int, worker: Worker) -> State:
        """Repeat the writes and the script: the worker no longer has the entry, even if the first run moved it."""
        after = _with_worker(state, number, replace(worker, repeats=None))
        ticket = worker.repeats
        if ticket is None or ticket == GONE or not (place := state.places[ticket]).parts:
            return after
        if not self.rules.late_leaves_them:
            return _put(after, ticket, replace(place, parts=LOST))
        return after if self.rules.written_once else _put(after, ticket, replace(place, parts=EXPIRING))

    def _let_go(self, state: State, number: int, worker: Worker) -> State:
        idle = _with_worker(state, number, replace(worker, holds=None, started=0, wrote=False))
        ticket = worker.holds
        mine = ticket is not None and ticket != GONE and state.places[ticket].owner == number
        return _put(idle, ticket, Place()) if mine and ticket is not None else idle

    def next_batch(self, state: State) -> list[int]:
        """TicketBook.next_batch: the shortest fully arrived prefix that fills a batch."""
        batch: list[int] = []
        for ticket, place in enumerate(state.places):
            if place.stage in (COMMITTED, TRAINED):
                continue
            if place.stage != ARRIVED:
                return []
            batch.append(ticket)
            if len(batch) == self.batch_size:
                return batch
        return []

    def _commit(self, state: State, batch: list[int]) -> State:
        """trainer/commit.lua; the update follows, so versions count steps."""
        after = _put_all(state, batch, lambda _: Place(COMMITTED, step=state.steps))
        after = replace(after, steps=state.steps + 1)
        return after if self.rules.keep_credits else self._issue(after)

    def _announce(self, state: State, version: int) -> State:
        """trainer/issue.lua: announces, resolves and issues at once."""
        done = [n for n, place in enumerate(state.places) if place.stage == COMMITTED and place.step < version]
        after = _put_all(state, done, lambda _: Place(TRAINED))
        return self._issue(replace(after, announced=version))

    def _issue(self, state: State) -> State:
        """TicketBook.issue."""
        ended = {TRAINED} if self.rules.keep_credits else {TRAINED, COMMITTED}
        outstanding = sum(place.stage not in ended for place in state.places)
        count = max(0, min(self.credits - outstanding, self.num_draws - len(state.places)))
        return replace(state, places=state.places + (Place(),) * count)

    def check(self, before: State, after: State) -> str:
        """The invariant that a step breaks; empty if none."""
        for ticket, place in enumerate(after.places):
            was = before.places[ticket] if ticket < len(before.places) else place
            if ORDER[place.stage] < ORDER[COMMITTED] <= ORDER[was.stage]:
                return f"ticket {ticket} was trained and is {place}"
            if (was.stage, place.stage) == (ARRIVED, COMMITTED) and place.step - was.made_by > self.max_staleness:
                return f"ticket {ticket} is {place.step - was.made_by} versions stale"
            if (place.stage == HELD) != (place.owner != FREE):
                return f"ticket {ticket} is in two places: {place}"
            if self.parts and (place.parts == KEPT) != (place.stage == ARRIVED):
                return f"the parts of ticket {ticket} are not those of its entry: {place}"
        if self.rules.keep_credits and sum(place.stage != TRAINED for place in after.places) > self.credits:
            return "more outstanding than credits"
        return ""


def _reissued(place: Place) -> Place:
    """trainer/reissue.lua: adds a new entry; the old one is GONE."""
    return Place()


def _replaced(state: State, ticket: int) -> State:
    """Any other worker that believes to hold the ticket's entry now holds one that is GONE."""
    workers = tuple(replace(each, holds=GONE, started=0) if each.holds == ticket else each for each in state.workers)
    return replace(state, workers=workers)


def mirrored(state: State) -> State:
    """One representative of the two states that differ only in the numbering of the workers."""
    first, second = state.workers
    places = tuple(replace(p, owner=1 - p.owner) if p.owner != FREE else p for p in state.places)
    return min(state, replace(state, workers=(second, first), places=places), key=repr)


def _put(state: State, ticket: int, place: Place) -> State:
    return replace(state, places=(*state.places[:ticket], place, *state.places[ticket + 1 :]))


def _put_all(state: State, tickets: list[int], change: Callable[[Place], Place]) -> State:
    for ticket in tickets:
        state = _put(state, ticket, change(state.places[ticket]))
    return state


def _with_worker(state: State, number: int, worker: Worker) -> State:
    return replace(state, workers=(*state.workers[:number], worker, *state.workers[number + 1 :]))
