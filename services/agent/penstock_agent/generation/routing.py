"""Which server a call goes to. Pure but for the clock.

Invariants: a session stays with its server, which has its prefix in the cache, as long as that server may be asked; no
server gets more calls than its capacity while another has room; of the sessions with recent calls, a new one joins no
server that has more than `LOAD_FACTOR` times its share.

Each session has an order of its own over the servers (rendezvous hashing: by a hash of both names), so that the
sessions of a lost server spread over all others, and those of the others stay.
"""

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import xxhash

LOAD_FACTOR = 1.25  # lower is more even, higher moves fewer sessions
ACTIVE_SECONDS = 120.0  # a session without a call for longer is no load


@dataclass
class _Place:
    server: str
    used_at: float


class Router:
    """The places of sessions, and the running calls of this process by server."""

    def __init__(self, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`capacity`: calls that one server runs at once."""
        self._capacity = capacity
        self._clock = clock
        self._places: OrderedDict[str, _Place] = OrderedDict()  # the one that was used last is last
        self._running: Counter[str] = Counter()

    def choose(self, session: str, servers: Collection[str]) -> str:
        """One of the servers, of which there is at least one: those that may be asked now."""
        home = self._home(session, servers)
        free = [server for server in rendezvous(session, servers) if self._running[server] < self._capacity]
        if home is not None:
            return home if home in free or not free else free[0]
        if not free:
            return min(servers, key=lambda server: self._running[server])
        return self._for_new_session(free, servers)

    def _home(self, session: str, servers: Collection[str]) -> str | None:
        place = self._places.get(session)
        return place.server if place is not None and place.server in servers else None

    def _for_new_session(self, free: list[str], servers: Collection[str]) -> str:
        self._forget_idle()
        load = Counter(place.server for place in self._places.values())
        bound = math.ceil(LOAD_FACTOR * (sum(load[server] for server in servers) + 1) / len(servers))
        return next((server for server in free if load[server] < bound), free[0])

    def _forget_idle(self) -> None:
        oldest = self._clock() - ACTIVE_SECONDS
        while self._places and next(iter(self._places.values())).used_at < oldest:
            self._places.popitem(last=False)

    @contextmanager
    def running(self, session: str, server: str, servers: Collection[str]) -> Iterator[None]:
        """Surrounds a call. The session moves to `server` if its own is none of `servers`."""
        self._running[server] += 1
        self._use(session, self._home(session, servers) or server)
        try:
            yield
        finally:
            self._running[server] -= 1
            if session in self._places:
                self._use(session, self._places[session].server)

    def _use(self, session: str, server: str) -> None:
        self._places[session] = _Place(server, self._clock())
        self._places.move_to_end(session)


def rendezvous(session: str, servers: Collection[str]) -> list[str]:
    """The servers in the order that is this session's.

    >>> order = rendezvous("12", ["a", "b", "c"])
    >>> [each for each in order if each != "b"] == rendezvous("12", ["c", "a"])
    True
    """
    return sorted(servers, key=lambda server: xxhash.xxh3_64_intdigest(f"{session}\0{server}".encode()))
