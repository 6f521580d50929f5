"""Every interleaving of a run in miniature: tickets, two workers that may crash anywhere, late results, announcements.

The states of a model are explored breadth first; after each step the invariants of the design must hold. What the model
does in one step is one script of the broker, and its comment says which; a worker that is believed dead lives on and
may hand over late. Then each of the three staleness rules is left out: the bound must break in some interleaving.

    rule 1  a ticket keeps its credit until a version that includes its step is announced   TicketBook.announce
    rule 2  a server that serves an older version than announced takes no ticket            scripts.TAKE
    rule 3  what the engine asserts is checked before a batch is trained                    Consumer.next_batch

Rules 1 and 2 alone keep the bound as long as servers say the truth about their weights; rule 3 keeps it where one does
not. So its mutant lets servers lie, and so does the model that shows that rule 3 is enough against them.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

from penstock.tickets import TicketBook, TicketLimits, TicketState

TICKETS, HELD, ARRIVED, COMMITTED, TRAINED = "tickets", "held", "arrived", "committed", "trained"
ORDER = {stage: rank for rank, stage in enumerate((TICKETS, HELD, ARRIVED, COMMITTED, TRAINED))}
FREE = -1
GONE = -1


@dataclass(frozen=True)
class Rules:
    """Which rules the model obeys, and whether servers may lie about their version."""

    keep_credits: bool = True
    refuse_older: bool = True
    check_versions: bool = True
    liars: bool = False


@dataclass(frozen=True)
class Place:
    """A ticket: its stage, the worker that its entry is pending for, and the version that generated its group."""

    stage: str = TICKETS
    owner: int = FREE
    made_by: int = 0
    step: int = -1


@dataclass(frozen=True)
class Worker:
    """version: that it serves; holds: the ticket that it believes to hold; started: the version it began with.

    An entry that was replaced by another is GONE: the ids of entries never come back, so that no script can mistake it.
    """

    version: int = 0
    holds: int | None = None
    started: int = 0
    alive: bool = True


@dataclass(frozen=True)
class State:
    """All that the queue, the trainer and the workers know."""

    places: tuple[Place, ...] = ()
    workers: tuple[Worker, ...] = (Worker(), Worker())
    announced: int = 0
    steps: int = 0
    crashes: int = 0


@dataclass(frozen=True)
class Model:
    """One small run: B tickets a step."""

    rules: Rules
    num_draws: int
    batch_size: int = 1
    max_staleness: int = 0
    max_crashes: int = 2

    @property
    def credits(self) -> int:
        return (self.max_staleness + 1) * self.batch_size

    def start(self) -> State:
        return self._issue(State())

    def moves(self, state: State) -> Iterator[tuple[str, State]]:
        for number, worker in enumerate(state.workers):
            yield from self._worker_moves(state, number, worker)
        batch = self._next_batch(state)
        if batch:
            stale = [n for n in batch if state.steps - state.places[n].made_by > self.max_staleness]
            if stale and self.rules.check_versions:
                yield f"reissue {stale}", _put_all(state, stale, _reissued)
            else:
                yield f"commit {batch}", self._commit(state, batch)
        for version in range(state.announced + 1, state.steps + 1):
            yield f"announce {version}", self._announce(state, version)

    def _worker_moves(self, state: State, number: int, worker: Worker) -> Iterator[tuple[str, State]]:
        if worker.holds is None:
            for ticket, place in enumerate(state.places):
                if self._may_take(state, worker, ticket):
                    # scripts.TAKE: a free entry, or one whose holder's heartbeat has expired, becomes mine.
                    taken = _put(state, ticket, replace(place, stage=HELD, owner=number))
                    holding = replace(worker, holds=ticket, started=worker.version)
                    yield f"{number} takes {ticket}", _with_worker(taken, number, holding)
                    if state.crashes < self.max_crashes:
                        # The answer is lost on a broken connection and the take is repeated: nobody renews this entry.
                        yield f"{number} takes {ticket} unknowingly", replace(taken, crashes=state.crashes + 1)
        else:
            yield f"{number} hands over {worker.holds}", self._hand_over(state, number, worker)
            # scripts.GIVE_BACK.
            yield f"{number} gives back", self._let_go(state, number, worker)
        if worker.version < state.steps:
            # A push, or its own load: staged weights are at most those of the newest step.
            yield (
                f"{number} loads {worker.version + 1}",
                _with_worker(state, number, replace(worker, version=worker.version + 1)),
            )
        if worker.alive and state.crashes < self.max_crashes:
            # Its heartbeat has expired. Whether it really died shows in whether it ever moves again.
            dead = _with_worker(state, number, replace(worker, alive=False))
            yield f"{number} is believed dead", replace(dead, crashes=state.crashes + 1)
        elif not worker.alive:
            # scripts.BEAT of a worker that was only slow; a new process is one that holds nothing.
            yield f"{number} beats again", _with_worker(state, number, replace(worker, alive=True))
            yield f"{number} starts anew", self._start_anew(state, number, worker)

    def _may_take(self, state: State, worker: Worker, ticket: int) -> bool:
        place = state.places[ticket]
        if self.rules.refuse_older and not self.rules.liars and worker.version < state.announced:
            return False
        if not worker.alive or place.stage not in (TICKETS, HELD):
            return False
        owner = state.workers[place.owner]
        return place.stage == TICKETS or not (owner.alive and owner.holds == ticket)

    def _start_anew(self, state: State, number: int, worker: Worker) -> State:
        """A new process has a new name; what the old name holds is free, since that never beats again."""
        mine = [ticket for ticket, place in enumerate(state.places) if place.owner == number]
        return _put_all(_with_worker(state, number, Worker(version=worker.version)), mine, lambda _: Place())

    def _hand_over(self, state: State, number: int, worker: Worker) -> State:
        """scripts.HAND_OVER: XPENDING shows whether this very entry is mine; else nothing is published."""
        idle = _with_worker(state, number, replace(worker, holds=None, started=0))
        ticket = worker.holds
        if ticket is None or ticket == GONE or state.places[ticket].owner != number:
            return idle
        # Running requests continue under newer weights: the oldest token is of the version at the start.
        return _replaced(_put(idle, ticket, Place(ARRIVED, made_by=worker.started)), ticket)

    def _let_go(self, state: State, number: int, worker: Worker) -> State:
        idle = _with_worker(state, number, replace(worker, holds=None, started=0))
        ticket = worker.holds
        mine = ticket is not None and ticket != GONE and state.places[ticket].owner == number
        return _put(idle, ticket, Place()) if mine and ticket is not None else idle

    def _next_batch(self, state: State) -> list[int]:
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
        """trainer_scripts.COMMIT; the update follows, so that versions count steps."""
        after = _put_all(state, batch, lambda _: Place(COMMITTED, step=state.steps))
        after = replace(after, steps=state.steps + 1)
        return after if self.rules.keep_credits else self._issue(after)

    def _announce(self, state: State, version: int) -> State:
        """trainer_scripts.ANNOUNCE: announces, resolves and issues at once."""
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
        """What is wrong with a step; empty where nothing is."""
        for ticket, place in enumerate(after.places):
            was = before.places[ticket] if ticket < len(before.places) else place
            if ORDER[place.stage] < ORDER[COMMITTED] <= ORDER[was.stage]:
                return f"ticket {ticket} was trained and is {place}"
            if (was.stage, place.stage) == (ARRIVED, COMMITTED) and place.step - was.made_by > self.max_staleness:
                return f"ticket {ticket} is {place.step - was.made_by} versions stale"
            if (place.stage == HELD) != (place.owner != FREE):
                return f"ticket {ticket} is in two places: {place}"
        if self.rules.keep_credits and sum(place.stage != TRAINED for place in after.places) > self.credits:
            return "more outstanding than credits"
        return ""


def _reissued(place: Place) -> Place:
    """trainer_scripts.REISSUE: a new entry, and the old one is gone."""
    return Place()


def _replaced(state: State, ticket: int) -> State:
    """Whoever else believes to hold the entry of this ticket, holds what is GONE."""
    workers = tuple(replace(each, holds=GONE, started=0) if each.holds == ticket else each for each in state.workers)
    return replace(state, workers=workers)


def _mirrored(state: State) -> State:
    """One of the two states that differ only in the numbers of the workers."""
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


@dataclass(frozen=True)
class Explored:
    """wrong: the shortest path to a state that breaks an invariant, and what it breaks; stuck: states without a way
    on to the end of the run."""

    num_states: int
    wrong: str
    stuck: int


def explore(model: Model) -> Explored:
    start = model.start()
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    before: dict[State, list[State]] = {}
    ends: list[State] = []
    waiting = deque([start])
    while waiting:
        state = waiting.popleft()
        for name, found in model.moves(state):
            if wrong := model.check(state, found):
                return Explored(len(came_from), f"{_path(came_from, state)}, {name}: {wrong}", 0)
            after = _mirrored(found)
            before.setdefault(after, []).append(state)
            if after not in came_from:
                came_from[after] = (state, name)
                waiting.append(after)
        if len(state.places) == model.num_draws and all(p.stage in (COMMITTED, TRAINED) for p in state.places):
            ends.append(state)
    can_end = set(ends)
    while ends:
        for state in before.get(ends.pop(), []):
            if state not in can_end:
                can_end.add(state)
                ends.append(state)
    return Explored(len(came_from), "", len(came_from.keys() - can_end))


def _path(came_from: dict[State, tuple[State, str] | None], state: State) -> str:
    names: list[str] = []
    while (step := came_from[state]) is not None:
        state, name = step
        names.append(name)
    return ", ".join(reversed(names))


@pytest.mark.parametrize(
    "model",
    [
        Model(Rules(), num_draws=2),
        Model(Rules(), num_draws=2, batch_size=2),
        Model(Rules(), num_draws=2, max_staleness=1),
        Model(Rules(), num_draws=3, max_crashes=1),
        Model(Rules(liars=True), num_draws=2),
    ],
    ids=str,
)
def test_no_interleaving_breaks_an_invariant_or_loses_a_ticket(model: Model) -> None:
    explored = explore(model)
    assert explored.wrong == ""
    assert explored.stuck == 0, "from some states the run cannot end any more"
    assert explored.num_states > 100


@pytest.mark.parametrize(
    ("rules", "num_draws"),
    [
        (Rules(keep_credits=False, check_versions=False), 3),
        (Rules(refuse_older=False, check_versions=False), 3),
        (Rules(check_versions=False, liars=True), 3),
    ],
    ids=["rule 1", "rule 2", "rule 3"],
)
def test_without_any_one_rule_the_bound_breaks(rules: Rules, num_draws: int) -> None:
    assert "versions stale" in explore(Model(rules, num_draws, max_crashes=0)).wrong


def test_rules_one_and_two_alone_keep_the_bound_of_honest_servers() -> None:
    assert explore(Model(Rules(check_versions=False), num_draws=3, max_crashes=1)).wrong == ""


def test_the_model_issues_and_batches_as_the_book_does() -> None:
    """Along every path of a run without crashes the real book answers like the model."""
    model = Model(Rules(), num_draws=4, batch_size=2, max_staleness=1, max_crashes=0)
    waiting, seen = deque([model.start()]), 0
    known = {model.start()}
    while waiting:
        state = waiting.popleft()
        seen += 1
        book = TicketBook(TicketLimits(model.batch_size, model.credits, model.num_draws))
        committed = {n: place.step for n, place in enumerate(state.places) if place.stage == COMMITTED}
        open_tickets = [n for n, place in enumerate(state.places) if place.stage not in (COMMITTED, TRAINED)]
        book.restore(len(state.places), open_tickets, state.steps, committed)
        for number in open_tickets:
            if state.places[number].stage == ARRIVED:
                book.arrive(number, has_gradient=True)
        assert (book.next_batch() or []) == model._next_batch(state)
        assert book.issue() == []  # announcing issues in the same script
        assert sum(each is TicketState.COMMITTED for each in book.outstanding.values()) == len(committed)
        for _, after in model.moves(state):
            if after not in known and len(known) < 5000:
                known.add(after)
                waiting.append(after)
    assert seen > 100
