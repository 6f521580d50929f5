"""Where calls go: a session stays, servers share the load, and a lost server's sessions move."""

import contextlib
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from penstock_agent.generation.routing import ACTIVE_SECONDS, LOAD_FACTOR, Router, rendezvous

SERVERS = ["a", "b", "c"]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def routed(router: Router, session: str, servers: list[str]) -> str:
    """The server of a call that is answered at once."""
    server = router.choose(session, servers)
    with router.running(session, server, servers):
        return server


def test_a_session_stays_with_its_server() -> None:
    router = Router(capacity=8)
    first = {str(number): routed(router, str(number), SERVERS) for number in range(30)}
    assert set(first.values()) == set(SERVERS)
    for _ in range(3):
        assert {session: routed(router, session, SERVERS) for session in first} == first


def test_only_the_sessions_of_a_lost_server_move_and_they_spread() -> None:
    router = Router(capacity=8)
    before = {str(number): routed(router, str(number), SERVERS) for number in range(60)}
    left = ["a", "b"]
    after = {session: routed(router, session, left) for session in before}
    assert all(after[session] == server for session, server in before.items() if server != "c")
    assert {after[session] for session, server in before.items() if server == "c"} == {"a", "b"}
    again = {session: routed(router, session, SERVERS) for session in before}
    assert again == after  # their prefixes are there now


@given(st.lists(st.sampled_from("abcdefgh"), min_size=2, unique=True), st.integers(1, 60))
def test_new_sessions_are_spread_within_the_bound(servers: list[str], num_sessions: int) -> None:
    router = Router(capacity=1000)
    load = Counter(routed(router, str(number), servers) for number in range(num_sessions))
    assert max(load.values()) <= LOAD_FACTOR * num_sessions / len(servers) + 1


@given(st.integers(1, 5), st.integers(1, 20))
def test_no_server_is_over_its_capacity_while_another_has_room(capacity: int, num_calls: int) -> None:
    """All calls are of one session, as when one ticket has more episodes than a server takes."""
    router, running = Router(capacity), Counter[str]()
    with contextlib.ExitStack() as calls:
        for _ in range(num_calls):
            server = router.choose("0", SERVERS)
            has_room = any(running[each] < capacity for each in SERVERS)
            assert running[server] < capacity or not has_room
            running[server] += 1
            calls.enter_context(router.running("0", server, SERVERS))
    home = router.choose("0", SERVERS)
    assert home == rendezvous("0", SERVERS)[0]  # calls that overflowed did not move it


def test_beyond_all_room_a_session_waits_at_its_own_server() -> None:
    router = Router(capacity=1)
    with contextlib.ExitStack() as calls:
        for _ in range(3):
            calls.enter_context(router.running("0", router.choose("0", SERVERS), SERVERS))
        assert router.choose("0", SERVERS) == rendezvous("0", SERVERS)[0]
        with router.running("0", "a", SERVERS):
            assert router.choose("new", SERVERS) != "a"


def test_a_session_that_is_over_counts_no_longer() -> None:
    clock = Clock()
    router = Router(capacity=100, clock=clock)
    for number in range(9):
        routed(router, f"old {number}", ["a"])
    clock.now = ACTIVE_SECONDS / 2
    assert Counter(routed(router, f"new {number}", ["a", "b"]) for number in range(5)) == {"b": 5}
    clock.now += ACTIVE_SECONDS * 0.75
    assert Counter(routed(router, f"newer {number}", ["a", "b"]) for number in range(6))["a"] > 0
