"""One supervised process: how it is started, what state it is in, what its log says about its end.

Invariant: a child is the leader of its own session, so that Ctrl-C at the terminal reaches the launcher alone, and it
is tied to the launcher, so that it ends with it. Called by the supervisor.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from penstock.broker.embedded import EmbeddedServer
from penstock.process import KILL_SECONDS, ProcessIdentity, tied_command
from penstock_launch.restarts import Deaths, RestartPolicy

TAIL_BYTES = 16384  # enough for the longest error message
ERROR_LINES = 8


class State(StrEnum):
    """What a child does at the moment."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    ENDED = "ended"


class Startable(Protocol):
    """Something that becomes a process."""

    @property
    def name(self) -> str: ...
    @property
    def log_path(self) -> Path: ...
    @property
    def hint(self) -> str:
        """What it does before it can say so itself."""

    def spawn(self) -> "subprocess.Popen[bytes]":
        """Start it as a tied child in its own session, its output appended to `log_path`. Main thread only."""


@dataclass(frozen=True)
class Command:
    """A service that is a command line."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    log_path: Path
    hint: str = "starts"

    def spawn(self) -> "subprocess.Popen[bytes]":
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as output:
            return subprocess.Popen(
                tied_command(self.arguments),
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


@dataclass(frozen=True)
class EmbeddedQueue:
    """The embedded server as a child."""

    server: EmbeddedServer
    name: str = "queue"
    hint: str = "loads what an earlier run left"

    @property
    def log_path(self) -> Path:
        return self.server.log_path

    def spawn(self) -> "subprocess.Popen[bytes]":
        return self.server.spawn()


class Child:
    """A service over all its lives in this launch."""

    def __init__(
        self, start: Startable, policy: RestartPolicy, *, running: "subprocess.Popen[bytes] | None" = None
    ) -> None:
        """`running`: its process, where it was started before it was supervised."""
        self.name = start.name
        self.deaths = Deaths(policy)
        self.state = State.WAITING
        self.detail = ""
        """What it waits for while it starts, in its own words."""
        self.restarts = 0
        self.start_at = 0.0
        """Of the clock time.monotonic: when to start it, while it is waiting."""
        self.started_at = 0.0
        """Of the same clock: when it was started last."""
        self.identity: ProcessIdentity | None = None
        self._start = start
        self._process: subprocess.Popen[bytes] | None = None
        self._log_offset = 0
        self._session_cleared = False
        if running is not None:
            self._adopt(running)

    @property
    def log_path(self) -> Path:
        return self._start.log_path

    @property
    def waits_for(self) -> str:
        """What is shown of it while it starts."""
        return self.detail or self._start.hint

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        return self.state in (State.STARTING, State.READY)

    def start(self) -> None:
        """Start it; again, if it was started before."""
        if self._process is not None:
            self.restarts += 1
        with contextlib.suppress(FileNotFoundError):
            self._log_offset = self.log_path.stat().st_size
        self._adopt(self._start.spawn())

    def _adopt(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._session_cleared = False
        self.identity = ProcessIdentity.of(process.pid)
        self.state = State.STARTING
        self.detail = ""
        self.started_at = time.monotonic()

    def ready(self) -> None:
        """It can work now."""
        if self.state is State.STARTING:
            self.state = State.READY
            self.detail = ""
            self.deaths.ready()

    def poll(self) -> int | None:
        """Its exit code once it has ended (negative: the signal), and only once; else None."""
        if not self.running or self._process is None or (exit_code := self._process.poll()) is None:
            return None
        self.state = State.ENDED
        self.detail = describe_exit(exit_code)
        return exit_code

    def send(self, signal_number: int) -> None:
        """Signal it, if it runs."""
        if self.running and self._process is not None:
            self._process.send_signal(signal_number)

    def kill_session(self) -> None:
        """SIGKILL to it and to what it started in its session and left behind. Once for each life: ids are reused."""
        if self._process is None or self._session_cleared:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_SECONDS)
        self._session_cleared = True
        if self.running:
            self.state = State.ENDED
            self.detail = "killed"

    def error_lines(self) -> list[str]:
        """What it said at its end: the last lines of its log that are no JSON events, else the last line."""
        lines = self.log_tail()
        last: list[str] = []
        for line in reversed(lines):
            if line.startswith("{"):
                break
            last.insert(0, line)
        if len(last) > ERROR_LINES:  # the first says what happened, the last ones why
            last = [last[0], *last[1 - ERROR_LINES :]]
        return last or lines[-1:]

    def log_tail(self) -> list[str]:
        """The end of what it has logged since it was started last."""
        try:
            with self.log_path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._log_offset, size - TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except FileNotFoundError:
            return []
        return [line.rstrip() for line in text.splitlines() if line.strip()]


def describe_exit(exit_code: int) -> str:
    """An exit code in words."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"
