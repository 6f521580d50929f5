"""Every interleaving of a run in miniature (`ticket_model`).

The states of a model are explored breadth first; after each step the invariants of the design must hold. Then each of
the three staleness rules is left out: the bound must break in some interleaving.

Rules 1 and 2 alone keep the bound as long as servers report their weights correctly; rule 3 keeps it if a server does
not. So the mutant without rule 3 lets servers report wrongly, and so does the model that shows that rule 3 suffices.
"""

from collections import deque
from dataclasses import dataclass, replace

import pytest

from penstock.tickets import TicketBook, TicketLimits, TicketState
from tests.unit.common.tickets.ticket_model import ARRIVED, COMMITTED, TRAINED, Model, Rules, State, mirrored


@dataclass(frozen=True)
class Explored:
    """wrong: the shortest path to a state that breaks an invariant, and which one; stuck: the number of states from
    which the run cannot end.
    """

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
            after = mirrored(found)
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
        Model(Rules(), num_draws=2, parts=True),
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


@pytest.mark.parametrize("left_out", ["named_only_if_there", "written_once", "late_leaves_them"])
def test_without_any_one_rule_a_group_loses_its_parts(left_out: str) -> None:
    rules = replace(Rules(), **{left_out: False})
    assert "are not those of its entry" in explore(Model(rules, num_draws=2, parts=True)).wrong


def test_rules_one_and_two_alone_keep_the_bound_of_honest_servers() -> None:
    assert explore(Model(Rules(check_versions=False), num_draws=3, max_crashes=1)).wrong == ""


def test_the_model_issues_and_batches_as_the_book_does() -> None:
    """Along every path of a run without crashes, the real book gives the model's answers."""
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
        assert (book.next_batch() or []) == model.next_batch(state)
        assert book.issue() == []  # announcing issues in the same script
        assert sum(each is TicketState.COMMITTED for each in book.outstanding.values()) == len(committed)
        for _, after in model.moves(state):
            if after not in known and len(known) < 5000:
                known.add(after)
                waiting.append(after)
    assert seen > 100
