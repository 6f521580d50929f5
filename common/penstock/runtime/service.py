"""How a service runs: one process, one TaskGroup with its HTTP server and its loops.

Invariant: if a loop dies, the process dies, with an error line and a non-zero exit code, so a live /health never hides
a dead worker. SIGTERM and SIGINT set `stop`; loops watch it and end in order, then the server ends.

    main -> start(config) -> Service.run(loop, loop, ...)
                               |- uvicorn        ends last
                               '- loops          watch `stop`
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, NoReturn

import uvicorn
from fastapi import FastAPI

from penstock.config import Config
from penstock.config.load import load_config
from penstock.config.secrets import hide
from penstock.config.shown import secret_values
from penstock.durable import DISK_FAULTS, unwritable
from penstock.errors import ConfigError, PenstockError
from penstock.quiet import quiet_libraries
from penstock.runtime.connections import BoundedProtocol, max_connections, raise_file_limit
from penstock.runtime.guard import OwnNames
from penstock.runtime.logs import setup_logging
from penstock.runtime.output import complain
from penstock.runtime.process import heeded

log = logging.getLogger(__name__)

BACKLOG = 128  # connections that wait to be accepted
UNEXPECTED_EXIT_CODE = 70  # EX_SOFTWARE: a defect, not an expected condition


class Service:
    """One HTTP server and the loops of a service. Binds its port at once: `url` is known before the server answers."""

    def __init__(self, host: str, port: int, key: str, *, num_clients: int = 0) -> None:
        """ConfigError naming `key` (such as trainer.port) if the service cannot listen on the address.

        num_clients: connections beyond those of other services, of clients that wait long for their answers.
        """
        self._socket = listen(host, port, key)
        self._section = key.partition(".")[0]
        self._num_clients = num_clients
        self._names: set[str] = set()
        self.stop = asyncio.Event()
        self.advertise(host)

    @property
    def max_connections(self) -> int:
        """Those that it holds at once."""
        return max_connections(self._num_clients)

    def advertise(self, host: str) -> None:
        """Put `host`, a name or address that others reach, into `url`, and answer to it."""
        self._names.add(host.lower().rstrip("."))
        in_url = f"[{host}]" if ":" in host else host
        self.url = f"http://{in_url}:{self._socket.getsockname()[1]}"

    async def run(
        self, app: FastAPI, *, background: Sequence[Coroutine[Any, Any, None]] = (), **loops: Coroutine[Any, Any, None]
    ) -> None:
        """Serve until every loop has returned, then cancel `background` and end; raises the first error of any.

        `background` holds coroutines that never end, such as heartbeats.
        """
        server = self._server(app)
        running = asyncio.get_running_loop()
        stop_signals = (signal.SIGTERM, *heeded(signal.SIGINT))
        for number in stop_signals:
            running.add_signal_handler(number, self.stop.set)
        try:
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(self._serve(server), name="http")
                endless = [group.create_task(self._endless(loop)) for loop in background]
                await asyncio.gather(*(group.create_task(loop, name=name) for name, loop in loops.items()))
                server.should_exit = True
                await serving
                for task in endless:
                    task.cancel()
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        finally:
            for number in stop_signals:
                running.remove_signal_handler(number)
            self._socket.close()

    def _server(self, app: FastAPI) -> "_Server":
        config = uvicorn.Config(
            OwnNames(app, lambda: self._names, f"{self._section}.advertise_host"),
            http=BoundedProtocol,
            ws="none",
            limit_concurrency=self.max_connections,
            backlog=min(BACKLOG, max_connections()),  # so many are accepted before the first of them is counted
            log_config=None,
            access_log=False,
            lifespan="off",  # which no app has: its task would log a traceback if an error of a loop cancels it
            timeout_graceful_shutdown=5,
        )
        return _Server(config)

    async def _endless(self, loop: Coroutine[Any, Any, None]) -> None:
        await loop
        raise PenstockError(f"the background loop {loop} ended by itself; expected it to run until the end")

    async def _serve(self, server: uvicorn.Server) -> None:
        await server.serve(sockets=[self._socket])
        if not server.should_exit:
            raise PenstockError("the HTTP server ended by itself; expected it to run until the service stops")


class _Server(uvicorn.Server):
    """Uvicorn without its own signal handling: `Service` decides when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


def listen(host: str, port: int, key: str) -> socket.socket:
    """A socket that listens there; ConfigError naming `key` if there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Without the protocol asyncio does not recognise TCP, and leaves Nagle's algorithm on: the body of each answer
    # would wait 40 ms for the client to acknowledge its headers.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"{key}: cannot listen on {host}:{port} ({error.strerror}); expected a free port of this host, or 0 for any"
        ) from None
    bound.listen(BACKLOG)
    bound.set_inheritable(False)
    return bound


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error inside nested groups: the one that ended the rest."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def main(name: str, start: Callable[[Config], Awaitable[None]], argv: Sequence[str] | None = None) -> NoReturn:
    """Read the configuration, run the service, end the process with the exit code of the result."""
    quiet_libraries(os.environ)
    raise_file_limit()
    secrets: Sequence[str] = ()
    try:
        config = load_config(sys.argv[1:] if argv is None else argv)
        secrets = secret_values(config)
        setup_logging(name, config.run.name, config.log.level, secrets)
        asyncio.run(_as_coroutine(start(config)))
    except PenstockError as error:
        complain(hide(f"{name}: {error.kind}: {error}", secrets))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            complain(f"{name}: {PenstockError.kind}: {unwritable(error.filename or 'a file', error)}")
            sys.exit(PenstockError.exit_code)
        log.exception("%s ended by an unexpected error", name)
        sys.exit(UNEXPECTED_EXIT_CODE)
    sys.exit(0)


async def _as_coroutine(awaitable: Awaitable[None]) -> None:
    await awaitable
