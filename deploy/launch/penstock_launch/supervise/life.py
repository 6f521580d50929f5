"""One life of a service: a process of this host, or anything else that behaves like one.

Invariant: a life ends once, and its exit code stays. Lives of processes on other hosts are in `penstock_launch.on_ray`
and `penstock_launch.slurm`.
"""

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Protocol

from penstock.runtime.process import KILL_SECONDS, ProcessIdentity

TAIL_BYTES = 16384  # enough for the longest error message


class Life(Protocol):
    """The interface of a child's process."""

    @property
    def pid(self) -> int | None:
        """None while there is no process yet."""

    @property
    def host(self) -> str:
        """Address of the host that it runs on; empty: this one."""

    @property
    def identity(self) -> ProcessIdentity | None:
        """None unless it runs on this host, as a child of this process."""

    @property
    def progress(self) -> str:
        """The step of its start, before it answers requests; may be empty."""

    def poll(self) -> int | None:
        """Its exit code once it has ended (negative: the signal), else None."""

    def ending(self, exit_code: int) -> str:
        """An exit code in words."""

    def send(self, signal_number: int) -> None:
        """Signal it; no effect if it has ended."""

    def kill(self) -> None:
        """SIGKILL to it and to all of its session; waits for its end. Blocks."""

    def log_tail(self) -> list[str]:
        """The end of its log in this life."""


class LocalLife:
    """A process of this host, the leader of its own session."""

    host = ""
    progress = ""

    def __init__(self, process: "subprocess.Popen[bytes]", log_path: Path, log_offset: int = 0) -> None:
        """`log_offset`: how long its log was when it was started."""
        self.pid = process.pid
        self.identity = ProcessIdentity.of(process.pid)
        self._process = process
        self._log_path = log_path
        self._log_offset = log_offset

    def poll(self) -> int | None:
        return self._process.poll()

    def ending(self, exit_code: int) -> str:
        return describe_exit(exit_code)

    def send(self, signal_number: int) -> None:
        self._process.send_signal(signal_number)

    def kill(self) -> None:
        kill_session(self._process)

    def log_tail(self) -> list[str]:
        return read_tail(self._log_path, self._log_offset)


def kill_session(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL to a process and to all of the session that it leads; waits for its end."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_SECONDS)


def size_of(path: Path) -> int:
    """Of a file; 0 when there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def read_tail(path: Path, offset: int) -> list[str]:
    """The lines at the end of a log, none from before `offset`."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(offset, size - TAIL_BYTES))
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
