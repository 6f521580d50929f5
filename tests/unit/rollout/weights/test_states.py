"""All states of a server's weights, and what every transition keeps."""

from itertools import product

import pytest

from penstock.contracts import PolicyIdentity, ServerState
from penstock.contracts.services import Announcement
from penstock_rollout.weights import states
from penstock_rollout.weights.states import (
    Change,
    Fenced,
    Going,
    Held,
    Preparing,
    Replacing,
    Rest,
    Serving,
    State,
    Verifying,
    Waiting,
)

OLD = PolicyIdentity(1, "a" * 16)
WANTED = Announcement(PolicyIdentity(2, "b" * 16), "/v2", 1)
GOING: tuple[Going, ...] = (
    Waiting(),
    Serving(OLD),
    *(Fenced("late", served, needs_full) for served, needs_full in product((None, OLD), (False, True))),
)
HELD = tuple(Held(then, loaded) for then in GOING for loaded in (None, WANTED))
REST: tuple[Rest, ...] = (*GOING, *HELD)
CHANGES: tuple[Change, ...] = (
    *(Preparing(WANTED, before) for before in REST),
    *(Replacing(WANTED, before) for before in REST),
    *(Verifying(WANTED, before) for before in HELD),
)
ALL: tuple[State, ...] = (*REST, *CHANGES)


@pytest.mark.parametrize("state", ALL, ids=str)
def test_an_engine_that_is_started_anew_has_no_weights_and_ends_no_situation(state: State) -> None:
    lost = states.without_weights(state)
    assert (states.identity(lost), states.is_loaded(lost)) == (None, False)
    assert states.is_held(lost) == states.is_held(state)
    assert states.needs_full(lost) == states.needs_full(state)
    assert states.why_fenced(lost) == states.why_fenced(state)
    expected = ServerState.WAITING if isinstance(state, Serving) else states.name(state)
    assert states.name(lost) == expected
    assert states.without_weights(lost) == lost


@pytest.mark.parametrize("before", REST, ids=str)
def test_a_failure_is_told_and_keeps_what_is_served(before: Rest) -> None:
    failed = states.fenced(before, "other bytes", needs_full=True)
    assert (states.why_fenced(failed), states.needs_full(failed)) == ("other bytes", True)
    assert states.identity(failed) == states.identity(before)
    assert states.is_held(failed) == states.is_held(before)
    assert states.name(states.resumed(failed)) == (
        ServerState.PAUSED if states.unverified(failed) else ServerState.FENCED
    )


@pytest.mark.parametrize("before", REST, ids=str)
def test_a_success_ends_every_failure_and_is_proved_before_a_hold_ends(before: Rest) -> None:
    now = states.serving(before, WANTED)
    assert (states.identity(now), states.why_fenced(now)) == (WANTED.identity, "")
    assert states.is_held(now) == states.is_held(before)
    assert states.unverified(now) == (WANTED if states.is_held(before) else None)
    assert states.is_held(states.resumed(now)) == states.is_held(before)


@pytest.mark.parametrize("before", GOING, ids=str)
def test_a_hold_ends_where_it_began(before: Going) -> None:
    held = states.held(before)
    assert states.name(held) == ServerState.PAUSED
    assert states.held(held) == held
    assert states.resumed(held) == before
    assert states.resumed(Replacing(WANTED, held)) == Replacing(WANTED, before)


@pytest.mark.parametrize("state", CHANGES, ids=str)
def test_while_weights_change_the_old_ones_count_until_they_are_touched(state: Change) -> None:
    assert states.name(state) == ServerState.UPDATING
    served = states.identity(state.before)
    assert states.identity(state) == (None if isinstance(state, Replacing) else served)
    assert states.is_loaded(state) == (served is not None)
