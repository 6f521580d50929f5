"""One supervised service over all its lives: its start, its state, and the end of its log.

Invariant: a child of this host is the leader of its own session, so that Ctrl-C at the terminal reaches only the
launcher, and it is tied to the launcher, so that it ends with it.
"""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import msgspec

from penstock.broker.embedded import EmbeddedServer
from penstock.runtime.process import ProcessIdentity, tied_command
from penstock_launch.supervise.life import Life, LocalLife, size_of
from penstock_launch.supervise.restarts import Deaths, RestartPolicy

ERROR_LINES = 8
_BEGUN = re.compile(r'"event": "((?:[^"\\]|\\u[0-9a-f]{4}|\\[^u])*)')
"""What an event says, as far as a line that was cut holds it."""


class _Event(msgspec.Struct):
    event: str
    traceback: str = ""


class ChildState(StrEnum):
    """The present state of a child."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    ENDED = "ended"


class Startable(Protocol):
    """Starts a process."""

    @property
    def name(self) -> str: ...
    @property
    def log_path(self) -> Path: ...
    @property
    def hint(self) -> str:
        """Its activity before it answers requests."""

    def spawn(self, on_end: Callable[[], None]) -> Life:
        """Start it, its output appended to `log_path`. Main thread only.

        on_end: called from any thread at its end, unless it is a process of this host, whose end is a SIGCHLD.
        """


@dataclass(frozen=True)
class Command:
    """A service that is a command line."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    log_path: Path
    hint: str = "starts"
    cpus: frozenset[int] = frozenset()
    """On which it may run; empty: where this process may."""

    def spawn(self, on_end: Callable[[], None]) -> LocalLife:
        """A tied child in its own session."""
        offset = size_of(self.log_path)
        with _running_on(self.cpus):  # a child begins on the CPUs of the thread that starts it
            process = spawn_tied(self.arguments, self.environment, self.log_path)
        return LocalLife(process, self.log_path, offset)


@dataclass(frozen=True)
class EmbeddedQueue:
    """The embedded server as a child."""

    server: EmbeddedServer
    name: str = "queue"
    hint: str = "loads what an earlier run left"

    @property
    def log_path(self) -> Path:
        return self.server.log_path

    def spawn(self, on_end: Callable[[], None]) -> LocalLife:
        offset = size_of(self.log_path)
        return LocalLife(self.server.spawn(), self.log_path, offset)


def spawn_tied(
    arguments: tuple[str, ...], environment: Mapping[str, str], log_path: Path, folder: str | None = None
) -> "subprocess.Popen[bytes]":
    """Start a command in its own session, which ends with the calling thread. `folder`: its working folder."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as output:
        return subprocess.Popen(
            tied_command(arguments),
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@contextlib.contextmanager
def _running_on(cpus: frozenset[int]) -> Iterator[None]:
    """Keep this thread on some CPUs meanwhile, if there are any and the system allows it."""
    before = os.sched_getaffinity(0)
    if cpus:
        with contextlib.suppress(OSError):  # taken away since they were read, or forbidden in a container
            os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        if cpus:
            os.sched_setaffinity(0, before)


class Child:
    """A service over all its lives in this launch."""

    def __init__(self, start: Startable, policy: RestartPolicy, *, running: Life | None = None) -> None:
        """`running`: its life, if it was started before its supervision."""
        self.name = start.name
        self.deaths = Deaths(policy)
        self.state = ChildState.WAITING
        self.detail = ""
        """The step of its start, or how it ended, in words."""
        self.given_up = ""
        """Why it is not started again although the run goes on; empty: it is."""
        self.restarts = 0
        self.start_at = 0.0
        """By the clock time.monotonic: when to start it, while it waits."""
        self.started_at = 0.0
        """By the same clock: its last start."""
        self._start = start
        self._life: Life | None = None
        self._session_cleared = False
        if running is not None:
            self._adopt(running)

    @property
    def log_path(self) -> Path:
        return self._start.log_path

    @property
    def kind(self) -> str:
        """rollout, of rollout-3."""
        return self.name.partition("-")[0]

    @property
    def waits_for(self) -> str:
        """What is shown of it while it starts."""
        own = self.detail or self._start.hint
        if self._life is None or not self._life.progress:
            return own
        return self._life.progress if self._life.pid is None else f"{self._life.progress}: {own}"

    @property
    def pid(self) -> int | None:
        return self._life.pid if self._life else None

    @property
    def host(self) -> str:
        """Address of the host that it runs on; empty: this one."""
        return self._life.host if self._life else ""

    @property
    def identity(self) -> ProcessIdentity | None:
        """The pid of its process, if it is on this host."""
        return self._life.identity if self._life else None

    @property
    def running(self) -> bool:
        return self.state in (ChildState.STARTING, ChildState.READY)

    @property
    def expected(self) -> bool:
        """Whether it runs or will run again."""
        return self.running or self.state is ChildState.WAITING

    def start(self, on_end: Callable[[], None]) -> None:
        """Start it, for the first time or again."""
        life = self._start.spawn(on_end)
        if self._life is not None:
            self.restarts += 1
        self._adopt(life)

    def not_started(self, detail: str) -> None:
        """Its start has failed: it has no process."""
        self.state = ChildState.ENDED
        self.detail = detail

    def _adopt(self, life: Life) -> None:
        self._life = life
        self._session_cleared = False
        self.state = ChildState.STARTING
        self.detail = ""
        self.started_at = time.monotonic()

    def ready(self) -> None:
        """It can work now."""
        if self.state is ChildState.STARTING:
            self.state = ChildState.READY
            self.detail = ""
            self.deaths.ready()

    def poll(self) -> int | None:
        """Its exit code once it has ended (negative: the signal), and only once; else None."""
        if not self.running or self._life is None or (exit_code := self._life.poll()) is None:
            return None
        self.state = ChildState.ENDED
        self.detail = self._life.ending(exit_code)
        return exit_code

    def send(self, signal_number: int) -> None:
        """Signal it, if it runs."""
        if self.running and self._life is not None:
            self._life.send(signal_number)

    def kill_session(self) -> None:
        """SIGKILL to it and to what it started in its session and left behind. Once for each life: ids are reused."""
        if self._life is None or self._session_cleared:
            return
        self._life.kill()
        self._session_cleared = True
        if self.running:
            self.state = ChildState.ENDED
            self.detail = "killed"

    def error_lines(self) -> list[str]:
        """The end of its log: the last lines that are not JSON events, else what the last event says."""
        lines = self._life.log_tail() if self._life else []
        last: list[str] = []
        for line in reversed(lines):
            if line.startswith("{"):
                break
            last.insert(0, line)
        if len(last) > ERROR_LINES:  # the first line gives the error, the last ones its cause
            last = [last[0], *last[1 - ERROR_LINES :]]
        return last or [_event_of(line) for line in lines[-1:]]


def _event_of(line: str) -> str:
    """A JSON event of a log in words: what happened, and the error, without the way to it."""
    try:
        event = msgspec.json.decode(line, type=_Event)
    except msgspec.DecodeError:
        begun = _BEGUN.search(line)  # the disk had no room for the full line
        return msgspec.json.decode(f'"{begun[1]}"', type=str).strip() if begun else line
    return ": ".join([event.event, *event.traceback.splitlines()[-1:]])
