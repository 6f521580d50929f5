"""The connections of a service: how many there may be, and how long one may be open without a request.

Owns both limits, and the process's limit of files, which connections must not use up. Invariants: a connection on which
no request is being answered, or whose answer nobody reads, is closed after `IDLE_SECONDS`; if there are too many, the
one that has been idle for longest makes room, so that whoever holds connections locks nobody out.

    accepted -> idle -- request complete up to its body --> busy -- answered --> idle ...
                 '-- too late, or the oldest of too many --> closed
"""

import asyncio
import resource

from starlette.types import Receive
from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_SECONDS = 10.0  # for headers to arrive, or an answer to be read: a client of this network needs none of it
MAX_CONNECTIONS = 512
MOST_FILES = 2**16  # some programs that a service starts go through all numbers up to the limit


def raise_file_limit() -> None:
    """Let this process, and those that it starts, open as many files as the system allows them, within reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = raised_file_limit(soft, hard)
    if wanted != soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def raised_file_limit(soft: int, hard: int) -> int:
    """The limit of files that a service takes for itself."""
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    return soft if soft == resource.RLIM_INFINITY else max(soft, wanted)


def max_connections(num_clients: int = 0) -> int:
    """Those that this process may hold. `num_clients`: that may wait for an answer for minutes, all at once."""
    return connections_within(resource.getrlimit(resource.RLIMIT_NOFILE)[0], num_clients)


def connections_within(files: int, num_clients: int = 0) -> int:
    """So many that half of the files stay free for work, even while as many again are accepted and not yet counted."""
    most = MAX_CONNECTIONS + num_clients
    return most if files == resource.RLIM_INFINITY else max(1, min(most, files // 4))


async def client_gone(receive: Receive) -> None:
    """Return when the client of a request, whose body has been read, has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


class BoundedProtocol(H11Protocol):
    """Uvicorn's protocol, within the limits. Its headers are bounded too: h11 refuses those of more than 16 KiB.

    If all connections are busy, uvicorn answers a further one with 503 (its `limit_concurrency`).
    """

    _closing: asyncio.TimerHandle | None = None
    idle_since: float | None = None
    """By the loop's clock; None while a request is being answered."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()

    def _watch(self) -> None:
        """Begin or end the wait for the client."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and not self.flow.write_paused:
            self._stop_watching()
        elif self.idle_since is None:
            self.idle_since = self.loop.time()
            self._closing = self.loop.call_later(IDLE_SECONDS, self.transport.abort)

    def _stop_watching(self) -> None:
        self.idle_since = None
        if self._closing is not None:
            self._closing.cancel()

    def _make_room(self) -> None:
        idle = {
            each: each.idle_since
            for each in self.connections
            if isinstance(each, BoundedProtocol) and each is not self and each.idle_since is not None
        }
        if idle:
            oldest = min(idle, key=idle.__getitem__)
            oldest.transport.abort()
            self.connections.discard(oldest)  # it ends after those that are accepted at the same time have begun
